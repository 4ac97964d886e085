"""The Dask graph of a run: layers stage, attend, merge and write, with the edges that bound its memory.

    stage(i)   waits for attend(i - s) of its lane, which has s staging slots
    attend(i)  waits for stage(i), for what the s - 1 attends before it wait for (the lane takes them in order, whichever
               task runs first) and, with accumulators in memory, for the writes that free those which it begins to use
    merge(a)   waits for every attend that hands back a partial of chunk a and, with partials on disk, for the write
               that frees its accumulator (in memory only if its partials were there before)
    write(a)   waits for merge(a)

What is done already has no tasks. The graph is made and submitted piece by piece, so its size does not grow with the
problem; an edge may lead to a task of an earlier piece.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import Task, TaskRef

from oocattn.pipelines.engines.dask import tasks
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.watch.events import TaskEvent
from oocattn.planning.memory import STAGING_SLOTS

Key = tuple[str, int, int]
"""Layer and run, head group, and index of the subproblem or chunk."""

LAYERS = {"stage": set[str](), "attend": {"stage"}, "merge": {"attend"}, "write": {"merge"}}
"""The layers, and those that each takes data from."""


@dataclass
class _Tail:
    """The end of what a lane was given: subproblems, the attends that hold its slots, what those but the first wait for, and
    the writes that free accumulators."""

    count: int
    attends: deque[Key]
    needed: deque[list[Key]]
    writes: deque[Key]


class GraphBuilder:
    """Makes the pieces of one run's graph, in the order of submission, for the workers at `addresses`, one a lane.

    `unfinished` is the caller's: the keys that were submitted and have not finished. Nothing needs to wait for others.
    """

    def __init__(self, run: str, schedule: Schedule, addresses: Sequence[str], unfinished: Container[Key]) -> None:
        self._run = run
        self._schedule = schedule
        self._addresses = addresses
        self._unfinished = unfinished
        self._slots = slots = STAGING_SLOTS[schedule.plan.device]
        accumulators = schedule.plan.accumulators
        self._tails = [_Tail(0, deque(maxlen=slots), deque(maxlen=slots - 1), deque(maxlen=accumulators)) for _ in addresses]
        self._layers: dict[str, dict[Key, Task]] = {}
        self._workers: dict[Key, str] = {}

    def piece(
        self, subproblems: Iterable[tuple[int, int]], complete: Iterable[tuple[int, int]] = ()
    ) -> tuple[HighLevelGraph, list[Key]]:
        """The tasks of these (head group, subproblem)s and of the chunks that they complete, and the keys of all.

        First come (head group, chunk)s that were `complete` before.
        """
        self._layers = {name: {} for name in LAYERS}
        self._workers = {}
        for head_group, chunk in complete:
            self._add_chunk(head_group, chunk, ())
        for head_group, index in subproblems:
            wanted = self._schedule.wanted(head_group, index)
            contributors = {chunk: self._schedule.contributors(head_group, chunk) for chunk in wanted}
            self._add_subproblem(head_group, index, contributors)
            for chunk, those in contributors.items():
                if those[-1] == index:
                    self._add_chunk(head_group, chunk, those)
        annotations = {"workers": lambda key, workers=self._workers: [workers[key]]}
        layers = {name: MaterializedLayer(layer, annotations=annotations) for name, layer in self._layers.items()}
        return HighLevelGraph(layers, LAYERS), list(self._workers)

    def _add_subproblem(self, head_group: int, index: int, contributors: Mapping[int, Sequence[int]]) -> None:
        """Add its tasks; `contributors` are those of each query chunk that it has to compute."""
        lane = self._schedule.subproblem_lane(head_group, index)
        tail = self._tails[lane]
        before = [tail.attends[0]] if len(tail.attends) == self._slots else []
        numbers = (tail.count, head_group, index, tuple(contributors))
        stage = self._add(lane, "stage", self._key("stage", head_group, index), tasks.stage, numbers, before)
        needed = [stage]
        if self._schedule.plan.partials == "memory":
            for chunk, those in contributors.items():
                if those[0] == index:
                    needed += self._take_accumulator(lane, self._key("write", head_group, chunk))
        waited_for = dict.fromkeys(itertools.chain(*tail.needed, needed))
        key = self._key("attend", head_group, index)
        tail.attends.append(self._add(lane, "attend", key, tasks.attend, (tail.count,), waited_for))
        tail.needed.append(needed)
        tail.count += 1

    def _add_chunk(self, head_group: int, chunk: int, contributors: Iterable[int]) -> None:
        lane = self._schedule.chunk_lane(head_group, chunk)
        before = [self._key("attend", head_group, index) for index in contributors]
        merge, write = (self._key(layer, head_group, chunk) for layer in ("merge", "write"))
        if self._schedule.plan.partials == "disk" or not before:  # in memory, attends have taken it
            before += self._take_accumulator(lane, write)
        self._add(lane, "merge", merge, tasks.merge, (head_group, chunk), before)
        self._add(lane, "write", write, tasks.write, (head_group, chunk), [merge])

    def _add(
        self,
        lane: int,
        layer: str,
        key: Key,
        function: Callable[..., TaskEvent | None],
        numbers: tuple[int | tuple[int, ...], ...],
        before: Iterable[Key],
    ) -> Key:
        waits = [TaskRef(other) for other in before if other in self._workers or other in self._unfinished]
        self._layers[layer][key] = Task(key, function, self._run, *numbers, *waits)
        self._workers[key] = self._addresses[lane]
        return key

    def _take_accumulator(self, lane: int, write: Key) -> list[Key]:
        """The write that must end before the chunk of `write` can take an accumulator: the one so many chunks before."""
        writes = self._tails[lane].writes
        freed = [writes[0]] if len(writes) == writes.maxlen else []
        writes.append(write)
        return freed

    def _key(self, layer: str, head_group: int, index: int) -> Key:
        return f"{layer}-{self._run}", head_group, index
