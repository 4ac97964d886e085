"""Whatever order the graph lets its tasks run in, no buffer is used for two things at once and everything gets done."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
from dask.task_spec import TaskRef
from dask.utils import key_split
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GENEROUS, GPU, MACHINE, a_problem, with_partials

from oocattn import Plan
from oocattn.pipelines.engines.dask.engine import GraphMaker
from oocattn.pipelines.graph import STEPS, Graph, Task, TaskId, pieces
from oocattn.pipelines.schedule import CompletedWork, Schedule
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import InputCost
from oocattn.planning.memory import count_slots
from oocattn.problem.given import GivenArrays


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Of any mask: also of one where head groups have different divisions, and chunks no subproblem."""
    decomposition = draw(st.sampled_from(["cqs", "strips"]))
    tokens = draw(st.integers(20, 200))
    more: dict[str, Any] = {"causal": draw(st.booleans())}
    kind = draw(st.sampled_from(["square", "window", "documents", "used"]))
    if kind != "square":
        more["keys"] = keys = draw(st.integers(20, 200))
        more["batch"] = 2
    if kind == "window":
        more["window_size"] = draw(st.integers(0, 50)), None if more["causal"] else draw(st.integers(0, 50))
    elif kind == "documents":
        edges = [
            np.array([0, *sorted(draw(st.lists(st.integers(0, end), min_size=3, max_size=3))), end])
            for end in (tokens, keys)
        ]
        more["given"] = GivenArrays(cu_seqlens_q=edges[0], cu_seqlens_k=edges[1])
    elif kind == "used":
        more["given"] = GivenArrays(seqused_k=np.array(draw(st.lists(st.integers(0, keys), min_size=2, max_size=2))))
    problem = a_problem(tokens, query_heads=4, kv_heads=draw(st.sampled_from([1, 2, 4])), **more)
    chunks = draw(st.integers(1, 20 if decomposition == "cqs" else 8))
    inputs = InputCost(ahead=draw(st.sampled_from([0, 1 << 24])))  # which takes other slots
    options: dict[str, Any] = {"chunks": chunks, "decomposition": decomposition, "inputs": inputs}
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
        done = [(*place, index) for index in plan.division_of(place[0]).contributors(place[1])]
        if plan.partials == "memory":
            partials.update(done[: chance.randint(0, len(done)) if chance.random() < share else 0])
        else:
            partials.update(partial for partial in done if chance.random() < share)
    return plan, CompletedWork(chunks, frozenset(partials))


def with_tokens(plan: Plan) -> list[int]:
    return [chunk for chunk in range(plan.query_chunks) if plan.query_rows(chunk)]


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
        slots = count_slots(self.plan.device, self.plan.inputs.ahead)
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


def act(lane: Lane, task: Task) -> None:
    step, head_group, index = task.id
    if step == "stage":
        lane.stage(task.turn, head_group, index, task.chunks)
    elif step == "attend":
        lane.attend(task.turn)
    else:
        (lane.merge if step == "merge" else lane.write)(head_group, index)


@given(plans_begun(), st.integers(1, 3), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=200)
def test_any_order_that_the_edges_allow_is_safe(
    begun: tuple[Plan, CompletedWork], lanes: int, window: int, seed: int
) -> None:
    plan, before = begun
    chance = random.Random(seed)
    schedule = Schedule(plan, lanes, before)
    subproblems = len(list(schedule.order()))
    ahead = pieces(Graph(schedule).tasks())
    waiting: dict[TaskId, Task] = {}
    submitted: set[TaskId] = set()
    finished: set[TaskId] = set()
    state = [Lane(plan) for _ in range(lanes)]
    done: Counter[str] = Counter()
    while True:
        if len(waiting) < window and (piece := next(ahead, None)) is not None:
            for task in piece:
                assert set(task.after) <= submitted, "an edge leads to a task that comes later"
                submitted.add(task.id)
                waiting[task.id] = task
        if not waiting:
            break
        ready = [task for task in waiting.values() if set(task.after) <= finished]
        assert ready, "nothing can run: the graph waits for itself"
        task = waiting.pop(chance.choice(ready).id)
        act(state[task.lane], task)
        finished.add(task.id)
        done[task.id[0]] += 1
    chunks = len(with_tokens(plan)) * plan.problem.head_groups - len(before.chunks)
    assert done == Counter({"stage": subproblems, "attend": subproblems, "merge": chunks, "write": chunks})
    if not (before.chunks or before.partials):
        parts = (
            map(division.subproblem, division.indices) for division in map(plan.division_of, range(plan.problem.head_groups))
        )
        some = sum(any(map(plan.query_rows, part.query_chunks)) for of_group in parts for part in of_group)
        assert subproblems == some
    assert not any(lane.slots or lane.held for lane in state)
    for lane in state:
        for place, indices in lane.folded.items():
            assert place not in before.chunks
            if plan.partials == "memory":
                assert tuple(indices) == schedule.contributors(*place)
            else:
                assert not {(*place, index) for index in indices} & before.partials


@given(plans(), st.integers(1, 3), st.integers(0, 4))
@settings(max_examples=50)
def test_heads_that_are_held_are_all_used_before_others_take_their_place(plan: Plan, lanes: int, held: int) -> None:
    """Else the rows of both are read again."""
    plan = replace(plan, held_groups=held)
    before: dict[TaskId, set[TaskId]] = {}
    reading: defaultdict[int, list[TaskId]] = defaultdict(list)
    for task in Graph(Schedule(plan, lanes)).tasks():
        before[task.id] = set(task.after).union(*(before[other] for other in task.after))
        if task.id[0] == "stage":
            of = plan.problem.head_group(task.id[1])
            for other in reading[task.lane]:
                same = plan.problem.head_group(other[1])
                together = not held or (same.batch, same.kv_head // held) == (of.batch, of.kv_head // held)
                assert together or other in before[task.id]
            reading[task.lane].append(task.id)


@given(plans(), st.integers(1, 3))
@settings(max_examples=20)
def test_a_task_runs_on_the_lane_of_its_subproblem_or_chunk(plan: Plan, lanes: int) -> None:
    schedule = Schedule(plan, lanes)
    for task in Graph(schedule).tasks():
        step, head_group, index = task.id
        lane_of = schedule.subproblem_lane if step in ("stage", "attend") else schedule.chunk_lane
        assert task.lane == lane_of(head_group, index)


@given(plans(), st.integers(1, 3))
@settings(max_examples=30)
def test_no_task_that_has_begun_waits_for_another(plan: Plan, lanes: int) -> None:
    """A lane does one step of a kind at a time, but for a GPU, which takes several subproblems at once."""
    last: dict[tuple[int, str], TaskId] = {}
    for task in Graph(Schedule(plan, lanes)).tasks():
        step = task.id[0]
        if step in ("merge", "write") or (step == "attend" and plan.device == "cpu"):
            before = last.get((task.lane, step))
            assert before is None or before in task.after
            last[task.lane, step] = task.id


@given(plans(), st.integers(1, 3))
@settings(max_examples=30)
def test_dask_graphs_are_valid_and_their_layers_have_no_cycle(plan: Plan, lanes: int) -> None:
    workers = [f"worker {lane}" for lane in range(lanes)]
    maker, earlier = GraphMaker("1234abcd", workers), {}
    for piece in pieces(Graph(Schedule(plan, lanes)).tasks()):
        graph, keys = maker.make([piece], earlier)
        graph.validate()
        list(TopologicalSorter(graph.dependencies).static_order())  # raises CycleError
        layer_of = {key: layer for layer in graph.layers.values() for key in layer}
        for task, key in zip(piece, keys, strict=True):
            made = graph[key]
            assert len(made.dependencies) == len(task.after)
            assert layer_of[key].annotations["workers"](key) == [workers[task.lane]]
            assert key[0] == f"{task.id[0]}-1234abcd"
        earlier.update({task.id: TaskRef(key) for task, key in zip(piece, keys, strict=True)})
        assert {key_split(key) for key in keys} <= set(STEPS)
