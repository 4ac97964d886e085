"""The lock of a result in an object store: objects that are created only where there is none.

A lock is the object `lock-N`, written once, by a conditional put, with its holder and a token of its own. The put may be
made again where its answer was lost: the token tells that the object that is there is one's own. Who takes over from
`lock-N` creates `lock-(N+1)` and then removes the older ones, oldest first: the highest is the lock, and a holder has lost
it where its own object is gone or there is the next one. No clock of another host counts, and no other kind of request is
needed.

The holder writes `beat-N` every few seconds. A lock is stale where that stops changing, or at once where it was held from
the very folder of job state whose lock, the kernel's, this process holds now.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from typing import Annotated

from oocattn import clock
from oocattn.errors import LockedError, OocattnError, ProblemError, TimeLimitError
from oocattn.naming import setting
from oocattn.records import ADDED, from_json, parse_json
from oocattn.storage.journal.claims import MOST_BYTES, UNKNOWN_HOLDER, Claim, Holder
from oocattn.storage.remote.objects import Objects
from oocattn.storage.remote.store import NoConditionalPutError

BEAT = 4.0  # seconds between beats: each is a request
BEATS_MISSED = 4  # so many of them may fail to appear before a holder is taken for dead
LOOK_SECONDS = 1.0  # between two looks for a beat
RELEASE_SECONDS = 10.0  # seconds for which a release waits for a beat in flight

LOCK_KEY = re.compile(r"lock-(\d{8})")

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class _Text:
    """What a lock says: its holder, and the identity of the folder of job state from which it is held."""

    holder: Holder
    folder: Annotated[str, ADDED] = ""


@dataclass(frozen=True)
class StoreClaim:
    """The claim of the holder with this token to lock `number` of a store."""

    objects: Objects
    number: int
    token: str

    def check(self, *, afresh: bool = False) -> None:
        """Raise LockedError where the lock is lost, RemoteError where that is unknown.

        Unless `afresh`, what was known less than a beat ago still holds: nobody takes over before several are missed.
        """
        asked = time.clock_gettime(time.CLOCK_BOOTTIME)  # which goes on while the machine sleeps
        if not afresh and 0 <= asked - _checked.get(self.token, 0.0) < BEAT:
            return
        own, later = _name(self.number), _name(self.number + 1)
        found = self.objects.read_starts({own: MOST_BYTES, later: 1})
        text = _parse(found[own])
        if text is None or text.holder.token != self.token or found[later] is not None:
            now = _highest(self.objects)
            taken = f"lost to {now.holder}" if now else "removed"
            raise LockedError(
                f"{self.objects}: the lock of this run was {taken}: this run ends; see whether another one goes on, and "
                "resume if not"
            )
        _checked[self.token] = asked


_checked: dict[str, float] = {}  # when a claim was last found to hold, in seconds since boot


@dataclass(frozen=True)
class BothClaims:
    """The claims to the folder of job state and to a result in a store."""

    folder: Claim
    store: Claim

    def check(self, *, afresh: bool = False) -> None:
        """Raise LockedError where one is lost."""
        self.folder.check(afresh=afresh)
        self.store.check(afresh=afresh)


class StoreLock(AbstractContextManager["StoreLock"]):
    """The lock of a result among the objects beside it, held from the folder of job state of identity `folder`.

    Raises LockedError with the holder's host and process, and ProblemError where the store has no conditional put. A stale
    lock is taken over, with a warning; TimeLimitError where it would be known only after `until`.
    """

    def __init__(self, objects: Objects, folder: str, until: float = math.inf) -> None:
        self._objects = objects
        holder = Holder.this_process()
        self._content = json.dumps(asdict(_Text(holder, folder))).encode()
        self.claim = StoreClaim(objects, _acquire(objects, self._content, folder, until), holder.token)
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="oocattn-store-lock", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        count = 0
        while not self._released.is_set():
            count += 1
            with suppress(OocattnError, OSError):  # the server is away
                self._objects.write(_beat_name(self.claim.number), f"{self.claim.token} {count}".encode())
            self._released.wait(BEAT)

    def __exit__(self, *error: object) -> None:
        self._released.set()
        self._beating.join(RELEASE_SECONDS)
        _checked.pop(self.claim.token, None)
        try:
            self._objects.remove(_beat_name(self.claim.number))
            self.claim.check()
            self._objects.remove(_name(self.claim.number), self._content)  # numbers begin again: it may be the next one's
            _checked.pop(self.claim.token, None)
        except (OocattnError, OSError) as failure:
            logger.warning("%s: the lock was not removed (%s); a later run takes it over", self._objects, failure)


def store_lock_holder(objects: Objects, dead: str = "") -> Holder | None:
    """Who holds the lock, or left it behind on another host.

    None where there is none, or one from the folder `dead`, whose lock is free, or of a process here that has ended. Workers
    of that one may go on for a moment: taking its lock over takes longer.
    """
    text = _highest(objects)
    if text is None or (dead and text.folder == dead) or text.holder.has_ended:
        return None
    return text.holder


def _acquire(objects: Objects, content: bytes, folder: str, until: float) -> int:
    """Take the lock for a folder of job state, or take it over; return its number."""
    while True:
        highest = max(_numbers(objects), default=0)
        if highest:
            before = _read(objects, highest)
            if before is None:
                continue  # released meanwhile
            if not (folder and before.folder == folder) and not _watch(objects, highest, before.holder, until):
                continue  # released meanwhile
            logger.warning("%s: the stale lock of %s is taken over", objects, before.holder)
        if _create(objects, _name(highest + 1), content):
            for number in _numbers(objects):
                if number <= highest:
                    objects.remove(_name(number))
                    objects.remove(_beat_name(number))
            return highest + 1


def _create(objects: Objects, key: str, content: bytes) -> bool:
    """Create a lock; return whether it is there, and one's own. Raises ProblemError where the store cannot or does not."""
    try:
        if not (objects.create(key, content) or objects.read(key, MOST_BYTES) == content):
            return False
        if not objects.create(key, content):  # else the server disregards the condition
            return True
        objects.remove(key)
        found = f"{objects}: its server disregards the condition of a put"
    except NoConditionalPutError as error:
        found = str(error)
    raise ProblemError(
        f"{found}, so nothing keeps two runs to one result apart: see to that yourself, and say so with "
        f"{setting('lock', 'none')}"
    )


def _watch(objects: Objects, number: int, holder: Holder, until: float) -> bool:
    """Return True when the holder is silent for too long, False when its lock is gone. LockedError at its first beat."""
    seconds = BEATS_MISSED * BEAT
    logger.warning("%s: watching for %g s whether %s is alive, who holds the lock", objects, seconds, holder)
    last, deadline = objects.read(_beat_name(number), MOST_BYTES), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if clock.now() > until:
            raise TimeLimitError(f"time limit reached before it was known whether {holder} is alive")
        time.sleep(min(LOOK_SECONDS, BEAT))
        if objects.read(_beat_name(number), MOST_BYTES) not in (last, None):  # a release removes it first
            raise LockedError(f"{objects}: the result is being written by {holder}; wait for it to end, or stop it")
        if objects.read(_name(number), MOST_BYTES) is None:
            return False
    return True


def _numbers(objects: Objects) -> list[int]:
    return [int(found[1]) for key in objects.list() if (found := LOCK_KEY.fullmatch(key))]


def _read(objects: Objects, number: int) -> _Text | None:
    return _parse(objects.read_start(_name(number), MOST_BYTES))


def _parse(content: bytes | None) -> _Text | None:
    try:
        return None if content is None else from_json(_Text, parse_json(content))
    except ValueError:  # also where it is longer
        return _Text(UNKNOWN_HOLDER)


def _highest(objects: Objects) -> _Text | None:
    return _read(objects, max(_numbers(objects), default=0))


def _name(number: int) -> str:
    return f"lock-{number:08d}"


def _beat_name(number: int) -> str:
    return f"beat-{number:08d}"
