"""The tasks of a run and their edges, as records that every engine runs: stage, attend, merge, write.

    stage(i)   waits for attend(i - s) of its lane, which has s staging slots. Where heads are held together, it waits for
               the stages since then that read from others, which are read again if they are needed again
    attend(i)  waits for stage(i). On a CPU it waits for attend(i - 1). On a GPU the lane launches subproblems in their
               order, so it waits for all that the attends in flight before it wait for. With accumulators in memory, it
               waits for the writes that free those which it begins to use
    merge(a)   waits for every attend that hands back a partial of chunk a, for the merge before it on its lane and, with
               partials on disk, for the write that frees its accumulator
    write(a)   waits for merge(a), and for the write before it on its lane

So a task that has begun waits for no other task, and a lane never holds more than was planned. What is done already has no
tasks. Every edge leads to a task that comes before. Tasks are made and submitted piece by piece: the graph that an engine
knows does not grow with the problem.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from oocattn.pipelines.failing import place_of
from oocattn.pipelines.schedule import Schedule
from oocattn.planning.interleaving import window_of

Step = Literal["stage", "attend", "merge", "write"]

STEPS: tuple[Step, ...] = ("stage", "attend", "merge", "write")
"""The steps of a lane, in the order in which data goes through them."""

TaskId = tuple[Step, int, int]
"""Step, head group, and index of the subproblem (stage, attend) or the query chunk (merge, write)."""


@dataclass(frozen=True)
class Task:
    """One step of the lane number `lane`, which begins when the tasks `after` have ended.

    `turn` counts the subproblems of the lane (stage, attend); `chunks` are the query chunks of the subproblem that it has to
    compute (stage).
    """

    id: TaskId
    lane: int
    after: tuple[TaskId, ...]
    turn: int = -1
    chunks: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """Where the task works, in words."""
        return place_of(*self.id)


def pieces(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Cut tasks into pieces, within which the steps depend on each other without a cycle: a lane's stage(i) comes one piece
    after its attend(i - s)."""
    piece: dict[TaskId, Task] = {}
    for task in tasks:
        if any(other in piece and STEPS.index(other[0]) > STEPS.index(task.id[0]) for other in task.after):
            yield list(piece.values())
            piece = {}
        piece[task.id] = task
    if piece:
        yield list(piece.values())


@dataclass
class _LaneEnd:
    """The last tasks of a lane: those that later ones wait for."""

    attends: deque[TaskId]
    stages: deque[tuple[tuple[int, int], TaskId]]  # with the window of heads that each reads from
    needed: deque[list[TaskId]]  # what each of the attends in flight waits for
    freeing: deque[TaskId]  # the writes that free the lane's accumulators
    merges: deque[TaskId] = field(default_factory=lambda: deque(maxlen=1))
    writes: deque[TaskId] = field(default_factory=lambda: deque(maxlen=1))
    turns: int = 0


class Graph:
    """The tasks of what is left of a run, in the order of submission."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._plan = plan = schedule.plan
        self._slots = plan.buffers.slots
        in_flight = 1 if plan.device == "cpu" else self._slots
        self._ends = [
            _LaneEnd(
                attends=deque(maxlen=self._slots),
                stages=deque(maxlen=self._slots - 1),
                needed=deque(maxlen=in_flight - 1),
                freeing=deque(maxlen=plan.accumulators),
            )
            for _ in range(schedule.lanes)
        ]

    def tasks(self) -> Iterator[Task]:
        """First of chunks whose partials are all there, then of each subproblem and of the chunks that it completes."""
        for head_group, chunk in self._schedule.complete():
            yield from self._of_chunk(head_group, chunk, ())
        for head_group, index in self._schedule.order():
            chunks = self._schedule.wanted(head_group, index)
            contributors = {chunk: self._schedule.contributors(head_group, chunk) for chunk in chunks}
            begun = [chunk for chunk, indices in contributors.items() if indices[0] == index]
            yield from self._of_subproblem(head_group, index, chunks, begun)
            for chunk, indices in contributors.items():
                if indices[-1] == index:
                    yield from self._of_chunk(head_group, chunk, indices)

    def _of_subproblem(
        self, head_group: int, index: int, chunks: tuple[int, ...], begun: Iterable[int]
    ) -> tuple[Task, Task]:
        """Stage and attend; it is the first one to contribute to the chunks that are `begun`."""
        lane = self._schedule.subproblem_lane(head_group, index)
        end = self._ends[lane]
        stage: TaskId = ("stage", head_group, index)
        attend: TaskId = ("attend", head_group, index)
        window = window_of(self._plan.problem, self._plan.held_groups, head_group)
        free = [end.attends[0]] if len(end.attends) == self._slots else []
        free += [other for others, other in end.stages if others != window]
        needed = [stage]
        if self._plan.partials == "memory":
            for chunk in begun:
                needed += self._take_accumulator(end, ("write", head_group, chunk))
        if self._plan.device == "cpu":
            needed += list(end.attends)[-1:]
        before = [other for others in end.needed for other in others]
        turn = end.turns
        end.attends.append(attend)
        end.stages.append((window, stage))
        end.needed.append(needed)
        end.turns += 1
        return (
            Task(stage, lane, tuple(free), turn, chunks),
            Task(attend, lane, tuple(dict.fromkeys(before + needed)), turn),
        )

    def _of_chunk(self, head_group: int, chunk: int, contributors: Sequence[int]) -> tuple[Task, Task]:
        """Merge and write."""
        lane = self._schedule.chunk_lane(head_group, chunk)
        end = self._ends[lane]
        merge: TaskId = ("merge", head_group, chunk)
        write: TaskId = ("write", head_group, chunk)
        attends: list[TaskId] = [("attend", head_group, index) for index in contributors]
        ready = [*attends, *end.merges]
        if self._plan.partials == "disk" or not contributors:  # in memory, attends have taken it
            ready += self._take_accumulator(end, write)
        merged = [merge, *end.writes]
        end.merges.append(merge)
        end.writes.append(write)
        return Task(merge, lane, tuple(ready)), Task(write, lane, tuple(merged))

    def _take_accumulator(self, end: _LaneEnd, write: TaskId) -> list[TaskId]:
        """The write that must end before the chunk of `write` can take an accumulator: the one so many chunks before."""
        freed = [end.freeing[0]] if len(end.freeing) == end.freeing.maxlen else []
        end.freeing.append(write)
        return freed
