"""The lock of a result: that of its folder of job state, and of a result in a store also one beside it there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from oocattn.errors import OocattnError, ProblemError
from oocattn.naming import setting
from oocattn.storage.journal.claims import Claim, UndisputedClaim
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.marks import forget_folder, id_of_folder


@contextmanager
def hold_lock(paths: ResultPaths, until: float = math.inf) -> Iterator[Claim]:
    """Hold the lock of a result, whose folder of job state is there, with what is kept in the store.

    Raises LockedError where another run holds it, ProblemError where its store has no lock and the caller did not say
    "none".
    """
    with FileLock(paths.lock, until) as lock:
        if paths.stored is None:
            yield lock.claim
            return
        try:
            with _store_lock(paths, lock.claim, until) as claim:
                if paths.mirror is not None:
                    paths.mirror.pull(whole=True)
                yield claim
        finally:
            _leave(paths)


def claim_elsewhere(claim: Claim) -> Claim:
    """The claim to a result in a store as a machine that does not see the folder of job state can check it."""
    from oocattn.storage.journal.store_lock import BothClaims

    return claim.store if isinstance(claim, BothClaims) else UndisputedClaim()


def require_lock(paths: ResultPaths) -> None:
    """Raise ProblemError where the store of a result has no lock and the caller did not say "none"."""
    if paths.stored is not None and paths.beside is None and paths.lock_kind != "none":
        raise ProblemError(
            f"result: {paths.result} has no conditional put, so nothing keeps two runs to it apart: see to that yourself, "
            f"and say so with {setting('lock', 'none')}"
        )


@contextmanager
def _store_lock(paths: ResultPaths, folder: Claim, until: float) -> Iterator[Claim]:
    """Hold the lock in the store too, unless the caller says that there is none."""
    if paths.lock_kind == "none":
        yield folder
        return
    from oocattn.storage.journal.store_lock import BothClaims, StoreLock

    require_lock(paths)
    assert paths.beside is not None
    with StoreLock(paths.beside, id_of_folder(paths), until) as beside:
        yield BothClaims(folder, beside.claim)


def _leave(paths: ResultPaths) -> None:
    """Remove what the folder of job state needs no more, while its lock is still held."""
    with suppress(OSError, OocattnError):  # the store may be away
        if paths.mirror is not None:
            paths.mirror.wipe()
        forget_folder(paths)


def fetch_state(paths: ResultPaths) -> None:
    """Have here what the store says of a run, to be looked at. Raises LockedError where one goes on from here."""
    if paths.mirror is not None:
        paths.make_state()
        with FileLock(paths.lock):
            paths.mirror.pull(whole=False)
        remove_state(paths)


def remove_state(paths: ResultPaths) -> None:
    """Remove the folder of job state of a result in a store, if nothing is in it."""
    if paths.stored is not None and paths.state_folder is not None:
        with suppress(OSError):
            paths.state.rmdir()
