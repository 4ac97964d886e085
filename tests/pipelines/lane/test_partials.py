"""Both stores of partials give back the same merged state, bit for bit, and notice what is lost, doubled or damaged."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support import GENEROUS, MACHINE, a_problem, with_partials

from oocattn import IntegrityError, Plan
from oocattn.kernels.merging import merge
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.lane import make_partials
from oocattn.pipelines.lane.memory import States
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.lane.partials.store import PartialStore
from oocattn.planning.candidates import make_plan


def plan_of(partials: str, tokens: int = 70, chunks: int = 7) -> Plan:
    problem = a_problem(tokens, query_heads=3, kv_heads=1, head_dim=4, causal=False)
    made = make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=chunks, decomposition="cqs")
    return with_partials(made, partials)


def partial_of(plan: Plan, chunk: int, subproblem: int) -> AttentionState:
    generator = torch.Generator().manual_seed(100 * chunk + subproblem)
    rows = len(plan.query_rows(chunk))
    state = AttentionState.empty(plan.problem.group_size, rows, plan.problem.head_dim)
    for tensor in (state.num, state.den, state.max):
        tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() * 3)
    state.keys.fill_(10 + subproblem)
    state.key_sum.fill_(1000 * subproblem)
    return state


def store_of(plan: Plan, folder: Path) -> PartialStore:
    states = {name: States() for name in plan.buffers.states()}
    for name, (count, rows) in plan.buffers.states().items():
        for _ in range(count):
            states[name].put(AttentionState.empty(plan.problem.group_size, rows, plan.problem.head_dim))
    return make_partials(plan, PartialFiles(folder, "run"), states, merge)


def add(store: PartialStore, plan: Plan, chunk: int, index: int) -> int:
    """Hand a partial over as lanes do: into what is undefined, or merged into what is there."""
    partial = partial_of(plan, chunk, index)
    destination = store.begin(0, chunk, index)
    if destination.merged:
        merge(destination.state, partial)
    else:
        for into, tensor in zip(fields(destination.state), fields(partial), strict=True):
            into.copy_(tensor)
    return store.end(0, chunk, index)


def fields(state: AttentionState) -> list[torch.Tensor]:
    return [state.num, state.den, state.max, state.keys, state.key_sum]


def add_all(store: PartialStore, plan: Plan, chunk: int, shuffled: bool = False) -> int:
    contributors = list(plan.division_of(0).contributors(chunk))
    if shuffled:
        random.Random(0).shuffle(contributors)
    return sum(add(store, plan, chunk, index) for index in contributors)


def copied(state: AttentionState) -> list[np.ndarray]:
    return [tensor.numpy().copy() for tensor in (state.num, state.den, state.max, state.keys, state.key_sum)]


@pytest.mark.parametrize("tokens", [70, 66, 40_000])
def test_both_stores_merge_to_the_same_bits(tmp_path: Path, tokens: int) -> None:
    found = {}
    for place in ("memory", "disk"):
        plan = plan_of(place, tokens)
        store = store_of(plan, tmp_path)
        for chunk in (6, 0, 3):
            written = add_all(store, plan, chunk, shuffled=place == "disk")
            assert (written > 0) == (place == "disk")
            found[place, chunk] = copied(store.collect(0, chunk).state)
            store.release(0, chunk)
            assert not list(tmp_path.iterdir())
    for chunk in (6, 0, 3):
        for memory, disk in zip(found["memory", chunk], found["disk", chunk], strict=True):
            np.testing.assert_array_equal(memory.view(np.uint8), disk.view(np.uint8))
        assert found["memory", chunk][3][0] == sum(10 + index for index in plan.division_of(0).contributors(chunk))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_lost_partial_is_noticed(tmp_path: Path, place: str) -> None:
    plan = plan_of(place)
    store = store_of(plan, tmp_path)
    *most, last = plan.division_of(0).contributors(1)
    for index in most:
        add(store, plan, 1, index)
    with pytest.raises(
        IntegrityError, match=rf"no partial of subproblems \[{last}\]|partial-0-1-{last}: the file is missing"
    ):
        store.collect(0, 1)


def test_in_memory_partials_come_in_order_and_once(tmp_path: Path) -> None:
    plan = plan_of("memory")
    first, second, *_ = plan.division_of(0).contributors(4)
    store = store_of(plan, tmp_path)
    with pytest.raises(IntegrityError, match=f"partial-0-4-{first}: the file is missing"):  # of what came before
        add(store, plan, 4, second)
    add(store, plan, 4, first)
    with pytest.raises(IntegrityError, match=f"subproblem {first} came, expected {second}"):
        add(store, plan, 4, first)


def test_a_damaged_partial_on_disk_is_named_and_can_be_replaced(tmp_path: Path) -> None:
    plan = plan_of("disk")
    store = store_of(plan, tmp_path)
    add_all(store, plan, 5)
    right = copied(store.collect(0, 5).state)
    store.release(0, 5)
    add_all(store, plan, 5)
    victim = plan.division_of(0).contributors(5)[1]
    path = tmp_path / f"partial-0-5-{victim}"
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)
    damaged_content = bytes(content)
    for _ in range(5):  # whatever is held when it fails is given back
        path.write_bytes(damaged_content)
        with pytest.raises(IntegrityError, match=f"partial-0-5-{victim}: block 0 is damaged") as damaged:
            store.collect(0, 5)
        assert (damaged.value.head_group, damaged.value.subproblem) == (0, victim)
        assert not path.exists()
    add(store, plan, 5, victim)
    for again, expected in zip(copied(store.collect(0, 5).state), right, strict=True):
        np.testing.assert_array_equal(again, expected)
