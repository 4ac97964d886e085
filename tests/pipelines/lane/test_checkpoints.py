"""What is folded in memory is saved where it is due, and what was saved is continued."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    GENEROUS,
    MACHINE,
    a_problem,
)

from oocattn import Plan
from oocattn.kernels.merging import merge
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.memory import States
from oocattn.pipelines.lane.partials import files as partial_files
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.lane.partials.memory import MemoryPartials
from oocattn.pipelines.lane.partials.store import DamagedPartialError
from oocattn.planning.candidates import make_plan

CHUNK = 4


def plan_of(**options: Any) -> Plan:
    problem = a_problem(70, query_heads=3, kv_heads=1, head_dim=4, causal=False)
    return make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=7, **options)


def store_of(plan: Plan, folder: Path, run: str = "run") -> MemoryPartials:
    states = States()
    for _ in range(plan.accumulators):
        states.put(AttentionState.empty(plan.problem.group_size, plan.chunk_rows, plan.problem.head_dim))
    return MemoryPartials(plan, PartialFiles(folder, run), states)


def fold(store: MemoryPartials, plan: Plan, position: int, ended: bool = True, chunk: int = CHUNK) -> None:
    """Fold the partial of the chunk's contributor at that position, as a lane does."""
    subproblem = plan.division_of(0).contributors(chunk)[position]
    generator = torch.Generator().manual_seed(100 * chunk + subproblem)
    rows = len(plan.query_rows(chunk))
    partial = AttentionState.empty(plan.problem.group_size, rows, plan.problem.head_dim)
    for tensor in (partial.num, partial.den, partial.max):
        tensor.copy_(torch.randn(tensor.shape, generator=generator).abs())
    partial.keys.fill_(1 + subproblem)
    partial.key_sum.fill_(1000 * subproblem)
    destination = store.begin(0, chunk, subproblem, not_finite=position)
    if not destination.merged:
        destination.state.reset()
    merge(destination.state, partial)
    if ended:
        store.end(0, chunk, subproblem)


def bits(state: AttentionState) -> list[np.ndarray]:
    return [tensor.numpy().copy().view(np.uint8) for tensor in (state.num, state.den, state.max, state.keys, state.key_sum)]


def folded(folder: Path) -> list[tuple[int, ...]]:
    """The subproblems in each file of a folder, as the file says."""
    return [partial.subproblems if partial else () for _, partial in PartialFiles(folder, "run").scan()]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_saved_accumulator_is_continued_to_the_same_bits(tmp_path: Path, count: int) -> None:
    plan = plan_of()
    everyone = plan.division_of(0).contributors(CHUNK)
    whole, killed = store_of(plan, tmp_path), store_of(plan, tmp_path)
    for position in range(len(everyone)):
        fold(whole, plan, position)
    for position in range(count):
        fold(killed, plan, position)
    written = killed.save(patient=False)
    assert folded(tmp_path) == [everyone[:count]]
    assert written == sum(path.stat().st_size for path in tmp_path.iterdir()) <= plan.scratch_disk
    assert killed.save(patient=False) == 0  # nothing has come since
    resumed = store_of(plan, tmp_path)
    for position in range(count, len(everyone)):
        fold(resumed, plan, position)
    expected, found = whole.collect(0, CHUNK), resumed.collect(0, CHUNK)
    assert found.not_finite == expected.not_finite == sum(range(len(everyone)))
    for ours, right in zip(bits(found.state), bits(expected.state), strict=True):
        np.testing.assert_array_equal(ours, right)
    resumed.release(0, CHUNK)
    assert not list(tmp_path.iterdir())


def test_a_later_save_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    plan = plan_of()
    store = store_of(plan, tmp_path)
    for position in range(2):
        fold(store, plan, position)
        store.save(patient=False)
    assert folded(tmp_path) == [plan.division_of(0).contributors(CHUNK)[:2]]


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove", "another run", "older"])
def test_a_damaged_checkpoint_is_named_and_removed(tmp_path: Path, spoil: str) -> None:
    plan = plan_of()
    store = store_of(plan, tmp_path, "another" if spoil == "another run" else "run")
    for position in range(1 if spoil == "older" else 2):
        fold(store, plan, position)
    store.save(patient=False)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    if spoil == "remove":
        path.unlink()
    elif spoil in ("flip", "cut"):
        path.write_bytes(content if spoil == "flip" else content[:-1])
    resumed = store_of(plan, tmp_path)
    with pytest.raises(DamagedPartialError, match=path.name) as damaged:
        fold(resumed, plan, 2)
    assert damaged.value.subproblem == plan.division_of(0).contributors(CHUNK)[0]
    assert not list(tmp_path.iterdir())
    fold(resumed, plan, 0)  # from the beginning, and with the accumulator that was given back
    for _ in range(plan.accumulators - 1):
        assert resumed._accumulators._free.take()


def test_nothing_is_folded_into_an_accumulator_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    store = store_of(plan, tmp_path)
    fold(store, plan, 0)
    writing, may_write = threading.Event(), threading.Event()
    real = partial_files.write_blocks

    def slow(*arguments: Any) -> int:
        writing.set()
        assert may_write.wait(10)
        return real(*arguments)

    monkeypatch.setattr(partial_files, "write_blocks", slow)
    saving = threading.Thread(target=store.save, args=(True,))
    folding = threading.Thread(target=fold, args=(store, plan, 1))
    saving.start()
    assert writing.wait(10)
    folding.start()
    fold(store, plan, 0, chunk=5)  # another chunk does not wait
    folding.join(0.2)
    assert folding.is_alive()
    may_write.set()
    folding.join(10)
    saving.join(10)
    assert folded(tmp_path) == [plan.division_of(0).contributors(CHUNK)[:1]]


def test_a_save_waits_for_partials_in_flight_or_leaves_them_out(tmp_path: Path) -> None:
    plan = plan_of()
    store = store_of(plan, tmp_path)
    fold(store, plan, 0)
    fold(store, plan, 1, ended=False)
    assert store.save(patient=False) == 0
    waiting = threading.Thread(target=store.save, args=(True,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    store.end(0, CHUNK, plan.division_of(0).contributors(CHUNK)[1])
    waiting.join(10)
    assert folded(tmp_path) == [plan.division_of(0).contributors(CHUNK)[:2]]
    fold(store, plan, 2, ended=False)
    waiting = threading.Thread(target=store.save, args=(True,))
    waiting.start()
    store.stop_waiting()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_chunk_whose_partials_came_shortly_before_is_left_to_the_next_save(tmp_path: Path) -> None:
    plan = plan_of()
    store, everyone = store_of(plan, tmp_path), plan.division_of(0).contributors(CHUNK)
    fold(store, plan, 0)
    assert store.save(patient=True, recent=60) == 0
    time.sleep(0.05)
    fold(store, plan, 0, chunk=5)
    fold(store, plan, 1)
    assert store.save(patient=True, recent=0.04) > 0
    assert folded(tmp_path) == [everyone[:2]]  # also what has just come to it
    fold(store, plan, 2)
    assert store.save(patient=True, recent=60) == 0
    assert store.save(patient=False) > 0
    assert sorted(folded(tmp_path)) == sorted([everyone[:3], plan.division_of(0).contributors(5)[:1]])


def test_a_chunk_that_is_done_with_by_the_next_save_is_never_saved(tmp_path: Path) -> None:
    plan = plan_of()
    store = store_of(plan, tmp_path)
    for chunk in (CHUNK, 5):
        for position in range(len(plan.division_of(0).contributors(chunk))):
            fold(store, plan, position, chunk=chunk)
        assert store.save(patient=True, recent=60) == 0
        store.release(0, chunk)
    assert not list(tmp_path.iterdir())


def test_a_chunk_that_is_finished_next_is_not_saved_before_it_has_waited_for_that(tmp_path: Path) -> None:
    """A save would hold up its release, and the end of the run."""
    plan = plan_of()
    store, everyone = store_of(plan, tmp_path), plan.division_of(0).contributors(CHUNK)
    for position in range(len(everyone) - 1):
        fold(store, plan, position)
    fold(store, plan, len(everyone) - 1, ended=False)
    saving = threading.Thread(target=store.save, args=(True,), daemon=True)
    saving.start()
    saving.join(10)  # it does not wait for what is in flight
    assert not saving.is_alive()
    assert not store.save_pending(0, CHUNK)
    store.end(0, CHUNK, everyone[-1])
    assert store.save(patient=True, recent=60) == 0
    time.sleep(0.05)
    assert store.save(patient=True, recent=0.04) > 0  # it waits to be written for that long
    assert folded(tmp_path) == [everyone]


def test_a_chunk_that_has_all_is_saved_as_the_lane_ends(tmp_path: Path) -> None:
    plan = plan_of()
    store, everyone = store_of(plan, tmp_path), plan.division_of(0).contributors(CHUNK)
    for position in range(len(everyone)):
        fold(store, plan, position)
    assert store.save(patient=False) > 0
    assert folded(tmp_path) == [everyone]


def test_a_save_that_waits_is_over_when_what_it_waits_for_is_finished_next(tmp_path: Path) -> None:
    plan = plan_of()
    store, everyone = store_of(plan, tmp_path), {chunk: plan.division_of(0).contributors(chunk) for chunk in (CHUNK, 5)}
    for chunk in everyone:
        fold(store, plan, 0, chunk=chunk, ended=False)
    saving = threading.Thread(target=store.save, args=(True,), daemon=True)
    saving.start()
    deadline = time.monotonic() + 20
    while not (waited := [chunk for chunk in everyone if store.save_pending(0, chunk)]):
        saving.join(0.01)
        assert time.monotonic() < deadline
    other = ({*everyone} - {*waited}).pop()
    for position in range(1, len(everyone[other])):  # which nobody waits for: its partials go on to come
        fold(store, plan, position, chunk=other, ended=False)
        store.end(0, other, everyone[other][position - 1])
    store.end(0, waited[0], everyone[waited[0]][0])
    saving.join(10)
    assert not saving.is_alive()
    assert folded(tmp_path) == [everyone[waited[0]][:1]]


def test_a_chunk_that_is_never_idle_is_made_so_for_a_save(tmp_path: Path) -> None:
    plan = plan_of()
    store, first = store_of(plan, tmp_path), plan.division_of(0).contributors(CHUNK)[0]
    fold(store, plan, 0, ended=False)
    assert not store.save_pending(0, CHUNK)
    saving = threading.Thread(target=store.save, args=(True,))
    saving.start()
    while not store.save_pending(0, CHUNK):  # from then on a lane brings back what is under way before it begins more
        saving.join(0.01)
    store.end(0, CHUNK, first)
    fold(store, plan, 1, ended=False)  # comes at once, and waits all the same
    assert folded(tmp_path) == [(first,)]
    saving.join(10)
    assert not saving.is_alive()
