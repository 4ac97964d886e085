"""The interface and common code of stores of partials, `partials.memory` and `partials.disk`.

Partials are merged by quorum index, so a merged state is the same bit for bit, whatever computed the partials and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.memory import States
from oocattn.planning.plan import Plan


class DamagedPartialError(IntegrityError):
    """A partial was lost or damaged, and removed: compute its subproblem again."""

    def __init__(self, message: str, head_group: int, chunk: int, subproblem: int) -> None:
        super().__init__(message, head_group, chunk, subproblem)
        self.head_group = head_group
        self.chunk = chunk
        self.subproblem = subproblem

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Destination:
    """Host memory for a partial: overwritten or, where `merged`, merged into."""

    state: AttentionState
    merged: bool


@dataclass(frozen=True)
class MergedChunk:
    """The merged state of a query chunk, with counts of NaN and Inf in q, k and v."""

    state: AttentionState
    not_finite: int


Sums = Sequence[NDArray[np.float64]]
"""Contiguous arrays."""


class PartialStore(Protocol):
    """Takes partials as they come, and gives back merged states of query chunks, in an accumulator until their release."""

    def begin(self, head_group: int, chunk: int, subproblem: int, not_finite: int = 0) -> Destination:
        """The destination of a partial; waits while its buffer, or the accumulator, is in use.

        `not_finite` is what the subproblem found in the chunk's inputs. Raises DamagedPartialError where what was on disk of
        the chunk before is not whole.
        """

    def save_pending(self, head_group: int, chunk: int) -> bool:
        """True if a `save` waits until this chunk's partials in flight have ended."""

    def end(self, head_group: int, chunk: int, subproblem: int, sums: Sums = ()) -> int:
        """The partial is there, whole; return the bytes written to disk, where `sums` over its rows are now."""

    def collect(self, head_group: int, chunk: int) -> MergedChunk:
        """Merge every partial of the chunk; the state is valid until `release`.

        In memory, the last partials may still be coming. Raises DamagedPartialError, and holds nothing, if one is not whole.
        """

    def release(self, head_group: int, chunk: int) -> None:
        """Forget the chunk: its output is written."""

    def save(self, patient: bool, recent: float = 0.0) -> int:
        """Have on disk what is in memory alone; return the bytes written.

        A chunk with partials in flight as this begins is left out or, where the save is `patient`, waited for, unless the
        last of all is in flight: then it is finished next. A chunk whose partials that are in memory alone all began in the
        `recent` seconds is left out, too, and one that has had all of them for less than that.
        """

    def stop_waiting(self) -> None:
        """Let no `save` be patient any more."""

    def close(self) -> None:
        """Let go of every state; nothing is begun, merged or saved any more."""


class Accumulators:
    """The chunk states of a lane; by the graph's edges one is free."""

    def __init__(self, plan: Plan, free: States) -> None:
        self._plan = plan
        self._free = free
        self._held: dict[tuple[int, int], AttentionState] = {}

    def take(self, head_group: int, chunk: int) -> AttentionState:
        """An accumulator for a chunk, its rows of it; what it holds is undefined."""
        self._held[head_group, chunk] = self._free.take()
        return of_chunk(self._plan, self._held[head_group, chunk], head_group, chunk)

    def give_back(self, head_group: int, chunk: int) -> None:
        """Let another chunk have it."""
        self._free.put(self._held.pop((head_group, chunk)))

    def close(self) -> None:
        """Let go of those that chunks hold."""
        self._held.clear()


def of_chunk(plan: Plan, state: AttentionState, head_group: int, chunk: int) -> AttentionState:
    """The part of a state, which has room for any chunk, that a chunk of a head group uses."""
    heads = len(plan.problem.head_group(head_group).query_heads)
    return state.heads(0, heads).rows(0, len(plan.query_rows(chunk)))
