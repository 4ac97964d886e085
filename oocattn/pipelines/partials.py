"""Where the partials of a run wait until all of their query chunk are there.

Both stores fold a chunk's partials in one fixed order, that of the subproblems, so the merged state is the same bit for
bit in either of them, whatever computed the partials and when. A store for another place is one more class here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError
from oocattn.kernels import Partial
from oocattn.memory import PARTIAL_BLOCK_ROWS
from oocattn.pipelines.arena import Pool
from oocattn.plans import Plan
from oocattn.storage.blockfile import read_blocks, read_label, write_blocks
from oocattn.storage.durable import PARTIAL

MergeStates = Callable[[Partial, Partial], None]
"""Merge the second state, whose memory is the caller's again afterwards, into the first; both in host memory."""


States = Pool[Partial]
"""States of one head group in host memory."""

Work = tuple[int, int, int]
"""A head group, one of its query chunks, and a subproblem that contributes to it: what a partial is of."""


class DamagedPartialError(IntegrityError):
    """A partial was lost or damaged, and what was left of it removed: compute its subproblem again, and then merge."""

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


@dataclass(frozen=True)
class Collected:
    """The merged state of a query chunk, and how many elements of its rows of q, k and v are NaN or Inf."""

    state: Partial
    not_finite: int


class PartialStore(Protocol):
    """Takes partials as they are computed and gives back the merged state of a query chunk.

    A chunk holds one of the lane's accumulators from its first partial (in memory) or its merge (on disk) to its release.
    """

    def begin(self, head_group: int, chunk: int, subproblem: int, not_finite: int = 0) -> Destination:
        """Where the partial of `chunk` from `subproblem` goes; on disk this waits for a buffer that another `end` frees.

        `not_finite` is what the subproblem found in the chunk's inputs.
        """

    def end(self, head_group: int, chunk: int, subproblem: int) -> int:
        """The partial is there, whole; return the bytes written to disk."""

    def collect(self, head_group: int, chunk: int) -> Collected:
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
        self._not_finite: defaultdict[tuple[int, int], int] = defaultdict(int)

    def begin(self, head_group: int, chunk: int, subproblem: int, not_finite: int = 0) -> Destination:
        folded = self._folded.setdefault((head_group, chunk), [])
        expected = self._division.contributors(chunk)[len(folded) :][:1]
        if (subproblem,) != expected:
            raise IntegrityError(
                f"head group {head_group}, chunk {chunk}: the partial of subproblem {subproblem} came, expected "
                f"{expected[0] if expected else 'no more'}"
            )
        merged = bool(folded)
        folded.append(subproblem)
        self._not_finite[head_group, chunk] += not_finite
        return Destination((self._accumulators.get if merged else self._accumulators.take)(head_group, chunk), merged)

    def end(self, head_group: int, chunk: int, subproblem: int) -> int:
        return 0

    def collect(self, head_group: int, chunk: int) -> Collected:
        folded = self._folded.get((head_group, chunk), [])
        missing = set(self._division.contributors(chunk)) - set(folded)
        if missing:
            raise IntegrityError(f"head group {head_group}, chunk {chunk}: no partial of subproblems {sorted(missing)}")
        return Collected(self._accumulators.get(head_group, chunk), self._not_finite[head_group, chunk])

    def release(self, head_group: int, chunk: int) -> None:
        del self._folded[head_group, chunk], self._not_finite[head_group, chunk]
        self._accumulators.give_back(head_group, chunk)


class DiskPartials:
    """A file a partial, merged when the last of a chunk is there: for accumulators that do not fit, or several lanes.

    A file says which run, chunk and subproblem it is of; what is there under its final name need not be computed again.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        run: str,
        accumulators: States,
        buffers: States,
        blocks: States,
        merge_states: MergeStates,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._run = run
        self._merge_states = merge_states
        self._accumulators = _Accumulators(plan, accumulators)
        self._buffers = buffers
        self._blocks = blocks
        self._begun: dict[tuple[int, int, int], tuple[Partial, int]] = {}

    def begin(self, head_group: int, chunk: int, subproblem: int, not_finite: int = 0) -> Destination:
        buffer = self._buffers.take()
        self._begun[head_group, chunk, subproblem] = buffer, not_finite
        return Destination(buffer.rows(0, len(self._plan.tokens(chunk))), merged=False)

    def end(self, head_group: int, chunk: int, subproblem: int) -> int:
        work = head_group, chunk, subproblem
        buffer, not_finite = self._begun.pop(work)
        partial = buffer.rows(0, len(self._plan.tokens(chunk)))
        blocks = [_arrays(partial.rows(start, stop)) for start, stop in _row_blocks(partial)]
        try:
            return write_blocks(partial_path(self._folder, work), blocks, {**self._label(work), "not_finite": not_finite})
        finally:
            self._buffers.put(buffer)

    def collect(self, head_group: int, chunk: int) -> Collected:
        state = self._accumulators.take(head_group, chunk)
        state.reset()
        not_finite = 0
        for subproblem in self._plan.division.contributors(chunk):
            work = head_group, chunk, subproblem
            try:
                not_finite += self._read(state, work)
            except IntegrityError as error:
                self._accumulators.give_back(head_group, chunk)
                partial_path(self._folder, work).unlink(missing_ok=True)
                raise DamagedPartialError(str(error), head_group, subproblem) from error
        return Collected(state, not_finite)

    def _read(self, state: Partial, work: Work) -> int:
        """Merge a partial's file into the state, block by block: a damaged one leaves it half merged.

        Returns how many elements that are NaN or Inf it tells of.
        """
        path, expected = partial_path(self._folder, work), self._label(work)
        label = read_label(path)
        if any(label.get(name) != value for name, value in expected.items()):
            raise IntegrityError(f"{path}: expected the partial {expected}, found {label}")
        row_blocks = list(_row_blocks(state))
        block = self._blocks.take()
        try:
            buffers = [block.rows(0, stop - start) for start, stop in row_blocks]
            for index in read_blocks(path, [_arrays(buffer) for buffer in buffers]):
                self._merge_states(state.rows(*row_blocks[index]), buffers[index])
        finally:
            self._blocks.put(block)
        return int(label["not_finite"])

    def release(self, head_group: int, chunk: int) -> None:
        self._accumulators.give_back(head_group, chunk)
        for subproblem in self._plan.division.contributors(chunk):
            partial_path(self._folder, (head_group, chunk, subproblem)).unlink()

    def _label(self, work: Work) -> dict[str, Any]:
        return {"run": self._run, "work": list(work)}


def partial_path(folder: Path, work: Work) -> Path:
    """The file of a partial in a folder."""
    return folder / "partial-{}-{}-{}".format(*work)


def partials_on_disk(folder: Path) -> set[Work]:
    """The partials whose files are in a folder. Whether they are whole shows when they are merged."""
    names = (path.name.split("-")[1:] for path in folder.glob("partial-*-*-*") if path.suffix != PARTIAL)
    return {(int(head_group), int(chunk), int(subproblem)) for head_group, chunk, subproblem in names}


def make_partials(
    plan: Plan, folder: Path, run: str, states: Mapping[str, States], merge_states: MergeStates
) -> PartialStore:
    """The store that the plan names, working with the states that `memory.Buffers` counts by these names.

    `folder` is where it may keep files, marked as those of `run`.
    """
    if plan.partials == "memory":
        return MemoryPartials(plan, states["accumulators"])
    return DiskPartials(plan, folder, run, states["accumulators"], states["buffers"], states["blocks"], merge_states)


def _row_blocks(partial: Partial) -> Iterator[tuple[int, int]]:
    rows = len(partial.keys)
    step = PARTIAL_BLOCK_ROWS
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _arrays(partial: Partial) -> list[npt.NDArray[np.generic]]:
    """The contiguous arrays of a partial's rows: num, den and max of each head, and the keys."""
    heads = [tensor[head].numpy() for tensor in (partial.num, partial.den, partial.max) for head in range(len(tensor))]
    return [*heads, partial.keys.numpy()]
