"""Whatever order the graph lets its tasks run in, no buffer is used for two things at once and everything gets done."""

from __future__ import annotations

import random
from collections import Counter

from dask.task_spec import Task
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GENEROUS, GPU, MACHINE, a_problem, with_partials

from oocattn import Plan
from oocattn.pipelines.graph import LAYERS, GraphBuilder, Key
from oocattn.pipelines.schedule import CompletedWork, Schedule
from oocattn.planning.candidates import make_plan
from oocattn.planning.memory import STAGING_SLOTS


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    decomposition = draw(st.sampled_from(["cqs", "strips"]))
    problem = a_problem(
        draw(st.integers(20, 200)), query_heads=4, kv_heads=draw(st.sampled_from([1, 2, 4])), causal=draw(st.booleans())
    )
    chunks = draw(st.integers(1, 20 if decomposition == "cqs" else 8))
    options = {"chunks": chunks, "decomposition": decomposition}
    machine = draw(st.sampled_from([MACHINE, GPU]))
    plan = make_plan(problem, machine, device_memory=GENEROUS, host_memory=GENEROUS, **options)
    return with_partials(plan, draw(st.sampled_from(["memory", "disk"]))) if decomposition == "cqs" else plan


@st.composite
def plans_begun(draw: st.DrawFn) -> tuple[Plan, CompletedWork]:
    """A plan, and what is done of it: any of its chunks, and of the others any partials or, in memory, the first ones."""
    plan, chance = draw(plans()), draw(st.randoms(use_true_random=False))
    share = draw(st.sampled_from([0, 0.3, 0.9, 1]))
    places = [(group, chunk) for group in range(plan.problem.head_groups) for chunk in with_tokens(plan)]
    chunks = frozenset(place for place in places if chance.random() < share)
    partials = set()
    for place in places:
        done = [(*place, index) for index in plan.division.contributors(place[1])]
        if plan.partials == "memory":
            partials.update(done[: chance.randint(0, len(done)) if chance.random() < share else 0])
        else:
            partials.update(partial for partial in done if chance.random() < share)
    return plan, CompletedWork(chunks, frozenset(partials))


def with_tokens(plan: Plan) -> list[int]:
    return [chunk for chunk in range(plan.chunks) if plan.tokens(chunk)]


class Lane:
    """What a lane holds, and a refusal of everything that does not fit."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.slots: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        self.held: set[tuple[int, int]] = set()
        self.folded: dict[tuple[int, int], list[int]] = {}
        self.merged: set[tuple[int, int]] = set()
        self.turn = 0

    def take(self, chunk: tuple[int, int]) -> None:
        self.held.add(chunk)
        assert len(self.held) <= self.plan.accumulators

    def stage(self, turn: int, head_group: int, index: int, wanted: tuple[int, ...]) -> None:
        slots = STAGING_SLOTS[self.plan.device]
        assert turn % slots not in {held % slots for held in self.slots}
        self.slots[turn] = head_group, index, wanted

    def attend(self, turn: int) -> None:
        """The subproblems up to this turn are taken in order, if an earlier task has not begun them."""
        while self.turn <= turn:
            head_group, index, wanted = self.slots[self.turn]
            self.turn += 1
            for chunk in wanted:
                place = head_group, chunk
                if self.plan.partials == "memory" and place not in self.held:
                    self.take(place)
                self.folded.setdefault(place, []).append(index)
        del self.slots[turn]

    def merge(self, head_group: int, chunk: int) -> None:
        if (head_group, chunk) not in self.held:  # partials on disk, or all of them there before
            self.take((head_group, chunk))
        self.merged.add((head_group, chunk))

    def write(self, head_group: int, chunk: int) -> None:
        assert (head_group, chunk) in self.merged
        self.held.remove((head_group, chunk))


def numbers_of(task: Task) -> list[int | tuple[int, ...]]:
    """The arguments of a task that are not the results of others."""
    return [number for number in task.args[1:] if isinstance(number, int | tuple)]


@given(plans_begun(), st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=200)
def test_any_order_that_the_edges_allow_is_safe(
    begun: tuple[Plan, CompletedWork], lanes: int, size: int, window: int, seed: int
) -> None:
    plan, before = begun
    chance = random.Random(seed)
    schedule = Schedule(plan, lanes, before)
    addresses = [f"worker {lane}" for lane in range(lanes)]
    unfinished: dict[Key, None] = {}
    builder = GraphBuilder("run", schedule, addresses, unfinished)
    waiting: dict[Key, Task] = {}
    finished: set[Key] = set()
    state = [Lane(plan) for _ in range(lanes)]

    def lane_of(key: Key) -> int:
        of_subproblem = key[0].startswith(("stage", "attend"))
        return (schedule.subproblem_lane if of_subproblem else schedule.chunk_lane)(*key[1:3])

    order, complete = list(schedule.order()), list(schedule.complete())
    subproblems = len(order)
    done: Counter[str] = Counter()
    while order or complete or waiting:
        if (order or complete) and (len(waiting) < window or not waiting):
            graph, keys = builder.piece([order.pop(0) for _ in range(min(size, len(order)))], complete)
            complete = []
            tasks = dict(graph)
            assert tasks.keys() == set(keys)
            waiting.update(tasks)
            unfinished.update(dict.fromkeys(keys))
        ready = [key for key, task in waiting.items() if task.dependencies <= finished]
        assert ready, "nothing can run: the graph waits for itself"
        key = chance.choice(ready)
        task = waiting.pop(key)
        layer = key[0].partition("-")[0]
        getattr(state[lane_of(key)], layer)(*numbers_of(task))
        finished.add(key)
        del unfinished[key]
        done[layer] += 1
    chunks = len(with_tokens(plan)) * plan.problem.head_groups - len(before.chunks)
    assert done == Counter({"stage": subproblems, "attend": subproblems, "merge": chunks, "write": chunks})
    if not (before.chunks or before.partials):
        handing_back = [plan.division.subproblem(index).query_chunks for index in range(plan.division.subproblems)]
        some = sum(any(plan.tokens(chunk) for chunk in chunks) for chunks in handing_back)
        assert subproblems == some * plan.problem.head_groups
    assert not any(lane.slots or lane.held for lane in state)
    for lane in state:
        for place, indices in lane.folded.items():
            assert place not in before.chunks
            if plan.partials == "memory":
                assert tuple(indices) == schedule.contributors(*place)
            else:
                assert not {(*place, index) for index in indices} & before.partials


@given(plans(), st.integers(1, 3))
@settings(max_examples=20)
def test_layers_are_named_and_every_task_is_pinned_to_its_lane(plan: Plan, lanes: int) -> None:
    schedule = Schedule(plan, lanes)
    addresses = [f"worker {lane}" for lane in range(lanes)]
    graph, keys = GraphBuilder("run", schedule, addresses, {}).piece(schedule.order())
    assert graph.layers.keys() == LAYERS.keys()
    assert graph.dependencies == LAYERS
    for name, layer in graph.layers.items():
        for key in layer:
            place = schedule.subproblem_lane if name in ("stage", "attend") else schedule.chunk_lane
            assert layer.annotations["workers"](key) == [addresses[place(*key[1:])]]
    assert len(keys) == len(set(keys))
