"""Files of a run's partials, with checksums: one of another run, or a damaged one, counts for nothing.

Where partials are merged on disk, a file holds what one subproblem handed back; where in memory, it is a checkpoint of what
the first few of a chunk's contributors did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError
from oocattn.planning.memory import PARTIAL_BLOCK_ROWS
from oocattn.storage.files.folders import names_in, remove_file
from oocattn.storage.files.operations import shows_damage
from oocattn.storage.journal.blocks import read_blocks, read_label, write_blocks
from oocattn.storage.journal.claims import Claim

if TYPE_CHECKING:  # PyTorch takes seconds, and `status` reads what files say of themselves
    from oocattn.kernels.state import AttentionState
    from oocattn.storage.remote.mirror import Mirror

_NAME = re.compile(r"partial-\d+-\d+-\d+")


@dataclass(frozen=True)
class PartialId:
    """Identity of a partial: head group, query chunk, and contributing subproblems."""

    head_group: int
    chunk: int
    subproblems: tuple[int, ...]


@dataclass(frozen=True)
class PartialFiles:
    """The partials of the run `run` in a folder, one file for a chunk and the first subproblem that is in it.

    They are written and removed under a `claim` to the result's lock. `step` is called for each file written and block read,
    and each file passed to the `mirror` of the folder of job state.
    """

    folder: Path
    run: str
    claim: Claim | None = None
    step: Callable[[], None] = lambda: None
    mirror: Mirror | None = None

    def path(self, partial: PartialId) -> Path:
        """The file of a partial."""
        return self.folder / f"partial-{partial.head_group}-{partial.chunk}-{partial.subproblems[0]}"

    def _sums_path(self, partial: PartialId) -> Path:
        return self.folder / f"sums-{partial.head_group}-{partial.chunk}-{partial.subproblems[0]}"

    def write(self, partial: PartialId, state: AttentionState, not_finite: int) -> int:
        """Write a partial durably, in place of one with the same first subproblem; return its bytes.

        `not_finite` counts the NaN and Inf that those subproblems found in the chunk's inputs.
        """
        self._check()
        blocks = [_arrays(rows) for rows in row_blocks(state)]
        written = write_blocks(self.path(partial), blocks, {**self._label(partial), "not_finite": not_finite})
        if self.mirror is not None:
            self.mirror.push(self.path(partial))
        self.step()
        return written

    def write_sums(self, partial: PartialId, sums: Sequence[npt.NDArray[np.float64]]) -> int:
        """Write what a subproblem summed over the rows of a chunk durably, before its partial counts; return the bytes."""
        if not sums:
            return 0
        self._check()
        written = write_blocks(self._sums_path(partial), [[array] for array in sums], self._label(partial))
        self.step()
        return written

    def has_sums(self, partial: PartialId) -> bool:
        """Whether the sums of a partial are there, by what their file says of itself."""
        try:
            return read_label(self._sums_path(partial)) == self._label(partial)
        except (IntegrityError, OSError) as error:
            if not shows_damage(error):
                raise
            return False

    def read_sums(self, partial: PartialId, buffers: Sequence[npt.NDArray[np.float64]]) -> None:
        """Read the sums of a partial. Raises IntegrityError, and removes them, where they are not whole."""
        path = self._sums_path(partial)
        try:
            for _ in read_blocks(path, [[buffer] for buffer in buffers]):
                pass
        except IntegrityError as error:
            self._check()
            self.discard(path)
            raise IntegrityError(f"{error}; it was removed: ask again, and what is in it is computed again") from None

    def not_finite(self, partial: PartialId) -> int:
        """Counts of NaN and Inf in a partial's file; IntegrityError if it is not there."""
        path, expected = self.path(partial), self._label(partial)
        label = read_label(path)
        count = label.get("not_finite")
        if not (expected.items() <= label.items() and isinstance(count, int) and count >= 0):
            raise IntegrityError(f"{path}: expected the partial {expected}, found {label}")
        return count

    def read(self, partial: PartialId, buffers: Sequence[AttentionState]) -> Iterator[int]:
        """Read a partial into the caller's blocks; yield the index of each whole one. Raises IntegrityError for others."""
        for index in read_blocks(self.path(partial), [_arrays(buffer) for buffer in buffers]):
            self.step()
            yield index

    def remove(self, partial: PartialId) -> None:
        """Remove a partial, if it is there."""
        self._check()
        self.discard(self.path(partial))

    def discard(self, path: Path) -> None:
        """Remove the file of a partial that serves nothing."""
        remove_file(path)
        if self.mirror is not None:
            self.mirror.drop(path)

    def scan(self) -> Iterator[tuple[Path, PartialId | None]]:
        """Yield every file with its partial; None if damaged or of another run. Raises OSError where that is unknown."""
        for name in names_in(self.folder):
            if _NAME.fullmatch(name):
                yield self.folder / name, self._read_id(self.folder / name)

    def fetched(self, partial: PartialId) -> AbstractContextManager[None]:
        """Have the file of a partial in the folder while inside, if it is anywhere, to be read."""
        return nullcontext() if self.mirror is None else self.mirror.fetched(self.path(partial))

    def _check(self) -> None:
        """Raise LockedError where the run has lost its lock."""
        if self.claim is not None:
            self.claim.check()

    def _read_id(self, path: Path) -> PartialId | None:
        try:
            label = read_label(path)
            partial = PartialId(label["head_group"], label["chunk"], tuple(label["subproblems"]))
            if label["run"] == self.run and self.path(partial) == path:
                return partial
        except (KeyError, TypeError, IndexError):
            pass
        except (IntegrityError, OSError) as error:
            if not shows_damage(error):
                raise
        return None

    def _label(self, partial: PartialId) -> dict[str, Any]:
        return {
            "run": self.run,
            "head_group": partial.head_group,
            "chunk": partial.chunk,
            "subproblems": list(partial.subproblems),
        }


def row_blocks(state: AttentionState) -> list[AttentionState]:
    """The blocks of rows of a state, as a file has them."""
    starts = range(0, len(state.keys), PARTIAL_BLOCK_ROWS)
    return [state.rows(start, start + PARTIAL_BLOCK_ROWS) for start in starts]


def _arrays(state: AttentionState) -> list[npt.NDArray[np.generic]]:
    """Contiguous arrays of a state's rows: num, den and max of each head, ledger."""
    heads = [tensor[head].numpy() for tensor in (state.num, state.den, state.max) for head in range(len(tensor))]
    return [*heads, state.keys.numpy(), state.key_sum.numpy()]
