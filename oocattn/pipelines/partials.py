"""Where the partials of a run wait until all of their query chunk are there.

Both stores fold a chunk's partials in one fixed order, that of the subproblems, so the merged state is the same bit for
bit in either of them, whatever computed the partials and when. A store for another place is one more class here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError
from oocattn.kernels import Partial
from oocattn.memory import PARTIAL_BLOCK_ROWS
from oocattn.pipelines.arena import Pool
from oocattn.plans import Plan
from oocattn.storage.blockfile import read_blocks, write_blocks

MergeStates = Callable[[Partial, Partial], None]
"""Merge the second state, whose memory is the caller's again afterwards, into the first; both in host memory."""


States = Pool[Partial]
"""States of one head group in host memory."""


class DamagedPartialError(IntegrityError):
    """A partial is lost or damaged: compute its subproblem again, and then merge."""

    def __init__(self, message: str, head_group: int, subproblem: int) -> None:
        super().__init__(message, head_group, subproblem)
        self.head_group = head_group
        self.subproblem = subproblem

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Destination:
    """Where a partial goes: host memory that it overwrites or, where `merged`, into whose content it is merged."""

    state: Partial
    merged: bool


class PartialStore(Protocol):
    """Takes partials as they are computed and gives back the merged state of a query chunk.

    A chunk holds one of the lane's accumulators from its first partial (in memory) or its merge (on disk) to its release.
    """

    def begin(self, head_group: int, chunk: int, subproblem: int) -> Destination:
        """Where the partial of `chunk` from `subproblem` goes; on disk this waits for a buffer that another `end` frees."""

    def end(self, head_group: int, chunk: int, subproblem: int) -> int:
        """The partial is there, whole; return the bytes written to disk."""

    def collect(self, head_group: int, chunk: int) -> Partial:
        """Merge every partial of the chunk; the state is valid until `release`.

        In memory, where each is merged as it comes, this is the state into which the last have begun to be merged. Raises
        DamagedPartialError, and holds nothing, if one is not whole.
        """

    def release(self, head_group: int, chunk: int) -> None:
        """Forget the chunk: its output is written."""


class _Accumulators:
    """The chunk states of a lane, allocated once. The edges of the graph see to it that one is free when it is needed."""

    def __init__(self, plan: Plan, free: States) -> None:
        self._plan = plan
        self._free = free
        self._held: dict[tuple[int, int], Partial] = {}

    def take(self, head_group: int, chunk: int) -> Partial:
        """An accumulator for a chunk; what it holds is undefined."""
        self._held[head_group, chunk] = self._free.take()
        return self.get(head_group, chunk)

    def get(self, head_group: int, chunk: int) -> Partial:
        """The rows of the accumulator that a chunk holds."""
        return self._held[head_group, chunk].rows(0, len(self._plan.tokens(chunk)))

    def give_back(self, head_group: int, chunk: int) -> None:
        self._free.put(self._held.pop((head_group, chunk)))


class MemoryPartials:
    """Each partial is folded into its chunk's accumulator as it comes, and they come in order."""

    def __init__(self, plan: Plan, accumulators: States) -> None:
        self._division = plan.division
        self._accumulators = _Accumulators(plan, accumulators)
        self._folded: dict[tuple[int, int], list[int]] = {}

    def begin(self, head_group: int, chunk: int, subproblem: int) -> Destination:
        folded = self._folded.setdefault((head_group, chunk), [])
        expected = self._division.contributors(chunk)[len(folded) :][:1]
        if (subproblem,) != expected:
            raise IntegrityError(
                f"head group {head_group}, chunk {chunk}: the partial of subproblem {subproblem} came, expected "
                f"{expected[0] if expected else 'no more'}"
            )
        merged = bool(folded)
        folded.append(subproblem)
        return Destination((self._accumulators.get if merged else self._accumulators.take)(head_group, chunk), merged)

    def end(self, head_group: int, chunk: int, subproblem: int) -> int:
        return 0

    def collect(self, head_group: int, chunk: int) -> Partial:
        folded = self._folded.get((head_group, chunk), [])
        missing = set(self._division.contributors(chunk)) - set(folded)
        if missing:
            raise IntegrityError(f"head group {head_group}, chunk {chunk}: no partial of subproblems {sorted(missing)}")
        return self._accumulators.get(head_group, chunk)

    def release(self, head_group: int, chunk: int) -> None:
        del self._folded[head_group, chunk]
        self._accumulators.give_back(head_group, chunk)


class DiskPartials:
    """A file a partial, merged when the last of a chunk is there: for accumulators that do not fit, or several lanes."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        accumulators: States,
        buffers: States,
        blocks: States,
        merge_states: MergeStates,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._merge_states = merge_states
        self._accumulators = _Accumulators(plan, accumulators)
        self._buffers = buffers
        self._blocks = blocks
        self._begun: dict[tuple[int, int, int], Partial] = {}

    def begin(self, head_group: int, chunk: int, subproblem: int) -> Destination:
        self._begun[head_group, chunk, subproblem] = buffer = self._buffers.take()
        return Destination(buffer.rows(0, len(self._plan.tokens(chunk))), merged=False)

    def end(self, head_group: int, chunk: int, subproblem: int) -> int:
        buffer = self._begun.pop((head_group, chunk, subproblem))
        partial = buffer.rows(0, len(self._plan.tokens(chunk)))
        blocks = [_arrays(partial.rows(start, stop)) for start, stop in _row_blocks(partial)]
        try:
            return write_blocks(self._path(head_group, chunk, subproblem), blocks)
        finally:
            self._buffers.put(buffer)

    def collect(self, head_group: int, chunk: int) -> Partial:
        state = self._accumulators.take(head_group, chunk)
        state.reset()
        for subproblem in self._plan.division.contributors(chunk):
            try:
                self._read(state, self._path(head_group, chunk, subproblem))
            except IntegrityError as error:
                self._accumulators.give_back(head_group, chunk)
                raise DamagedPartialError(str(error), head_group, subproblem) from error
        return state

    def _read(self, state: Partial, path: Path) -> None:
        """Merge a partial's file into the state, block by block: a damaged one leaves it half merged."""
        row_blocks = list(_row_blocks(state))
        block = self._blocks.take()
        try:
            buffers = [block.rows(0, stop - start) for start, stop in row_blocks]
            for index in read_blocks(path, [_arrays(buffer) for buffer in buffers]):
                self._merge_states(state.rows(*row_blocks[index]), buffers[index])
        finally:
            self._blocks.put(block)

    def release(self, head_group: int, chunk: int) -> None:
        self._accumulators.give_back(head_group, chunk)
        for subproblem in self._plan.division.contributors(chunk):
            self._path(head_group, chunk, subproblem).unlink()

    def _path(self, head_group: int, chunk: int, subproblem: int) -> Path:
        return self._folder / f"partial-{head_group}-{chunk}-{subproblem}"


def make_partials(plan: Plan, folder: Path, states: Mapping[str, States], merge_states: MergeStates) -> PartialStore:
    """The store that the plan names, working with the states that `memory.Buffers` counts by these names.

    `folder` is where it may keep files.
    """
    if plan.partials == "memory":
        return MemoryPartials(plan, states["accumulators"])
    return DiskPartials(plan, folder, states["accumulators"], states["buffers"], states["blocks"], merge_states)


def _row_blocks(partial: Partial) -> Iterator[tuple[int, int]]:
    rows = len(partial.keys)
    step = PARTIAL_BLOCK_ROWS
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _arrays(partial: Partial) -> list[npt.NDArray[np.generic]]:
    """The contiguous arrays of a partial's rows: num, den and max of each head, and the keys."""
    heads = [tensor[head].numpy() for tensor in (partial.num, partial.den, partial.max) for head in range(len(tensor))]
    return [*heads, partial.keys.numpy()]
