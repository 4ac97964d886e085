"""A run tells everything that it does, in order; does each thing once; and holds no more than its plan allows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from support import Recorder, amount_of, assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

from oocattn import Event, IntegrityError, Plan, TaskError
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.watch.events import TaskEvent

SETTINGS = [
    ({"chunks": 1}, True, "memory"),
    ({"chunks": 7}, False, "memory"),
    ({"chunks": 7}, True, "disk"),
    ({"chunks": 20}, True, "memory"),
    ({"chunks": 20}, False, "disk"),
    ({"chunks": 8, "decomposition": "strips"}, True, None),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("run") / "dataset.zarr", normal_arrays(161, heads=4, kv_heads=2))


@pytest.fixture(params=SETTINGS, ids=str, scope="module")
def ran(
    request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory, client: Client
) -> tuple[Plan, list[Event]]:
    options, causal, partials = request.param
    plan = plan_for(dataset, causal=causal, partials=partials, **options)
    recorder = Recorder([])
    carry_out(plan, dataset, tmp_path_factory.mktemp("ran") / "result.zarr", client, callbacks=[recorder])
    return plan, recorder.events


def test_events_come_in_order_and_are_as_many_as_planned(ran: tuple[Plan, list[Event]]) -> None:
    plan, events = ran
    kinds = [event.kind for event in events if event.kind != "progressed"]  # which a busy machine has, and others have not
    assert kinds[0] == "started"
    assert kinds[-2:] == ["committed", "ended"]
    chunks = sum(bool(plan.query_rows(chunk)) for chunk in range(plan.chunks)) * plan.problem.head_groups
    assert Counter(kinds) == {
        "started": 1, "staged": plan.subproblems, "attended": plan.subproblems, "merged": chunks, "written": chunks,
        "committed": 1, "ended": 1,
    }  # fmt: skip
    tasks = [event for event in events if isinstance(event, TaskEvent)]
    place = {(event.kind, event.head_group, event.index): number for number, event in enumerate(tasks)}
    assert len(place) == len(tasks)
    for (kind, head_group, index), number in place.items():
        if kind == "attended":
            assert place["staged", head_group, index] < number
        elif kind == "written":
            assert place["merged", head_group, index] < number
        elif kind == "merged":
            contributors = plan.division_of(0).contributors(index)
            assert all(place["attended", head_group, contributor] < number for contributor in contributors)


def test_times_and_amounts_are_those_of_the_work(ran: tuple[Plan, list[Event]]) -> None:
    plan, events = ran
    assert all(event.start <= event.stop for event in events)
    started, ended = events[0], events[-1]
    assert all(started.start <= event.start and event.stop <= ended.stop + 1e-3 for event in events)
    amounts = Counter()
    for event in events:
        amounts[event.kind] += amount_of(event)
    assert amounts["attended"] == amounts["merged"] == plan.problem.pairs
    written = next(link for link in plan.links if link.name == "write")
    assert amounts["written"] == written.amount
    report = ended.report
    assert (report.pairs, report.bytes_read, report.bytes_written) == tuple(
        amounts[kind] for kind in ("merged", "staged", "written")
    )
    assert started.plan == plan


def test_no_more_than_two_subproblems_are_staged_and_no_more_accumulators_held_than_planned(
    ran: tuple[Plan, list[Event]],
) -> None:
    plan, events = ran
    tasks = [event for event in events if isinstance(event, TaskEvent)]
    times = {(event.kind, event.head_group, event.index): event for event in tasks}
    # A slot is taken from the start of staging to the end of attending.
    changes = []
    for (kind, *place), event in times.items():
        if kind == "staged":
            changes += [(event.start, 1), (times["attended", *place].stop, -1)]
    assert most_at_once(changes) <= 2
    changes = []
    for (kind, head_group, chunk), event in times.items():
        if kind == "written":
            first = times["merged", head_group, chunk]
            if plan.partials == "memory":
                first = times["attended", head_group, plan.division_of(0).contributors(chunk)[0]]
            changes += [(first.stop, 1), (event.start, -1)]
    assert most_at_once(changes) <= plan.accumulators


def most_at_once(changes: list[tuple[float, int]]) -> int:
    """The largest sum of changes up to any time; at equal times those that end come first."""
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def test_a_failure_is_told_last(client: Client, fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(60), 10)
    recorder = Recorder([])

    def remove_a_chunk(event: Event) -> None:
        if event.kind == "started":
            (dataset / "k/c/0/0/5/0").unlink()

    with pytest.raises(IntegrityError, match=r"'k' of .* is missing"):
        carry_out(
            plan_for(dataset, chunks=7), dataset, fast_path / "result.zarr", client, callbacks=[recorder, remove_a_chunk]
        )
    kinds = [event.kind for event in recorder.events]
    assert kinds[0] == "started"
    assert kinds[-1] == "failed"
    assert not {"committed", "ended"} & set(kinds)
    assert "IntegrityError: array 'k'" in recorder.events[-1].error


def test_a_run_leaves_nothing_on_its_workers(client: Client, dataset: Path, fast_path: Path) -> None:
    worker = next(iter(client.cluster.workers.values()))
    before = set(worker.plugins)
    carry_out(plan_for(dataset, chunks=7), dataset, fast_path / "result.zarr", client)
    assert set(worker.plugins) == before
    assert not list((fast_path / "result.zarr.oocattn").glob("partials"))


def test_two_runs_share_a_cluster(client: Client, dataset: Path, fast_path: Path) -> None:
    inner = []

    def another(event: Event) -> None:
        if event.kind == "attended" and not inner:
            inner.append(carry_out(plan_for(dataset, chunks=7), dataset, fast_path / "inner.zarr", client))

    outer = carry_out(plan_for(dataset, chunks=13), dataset, fast_path / "outer.zarr", client, callbacks=[another])
    assert outer.report.pairs == inner[0].report.pairs == plan_for(dataset).problem.pairs


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_worker_with_one_thread_is_enough(dataset: Path, fast_path: Path, partials: str) -> None:
    """No task waits for another that has not begun: with one thread, it never would."""
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "memory_limit": 0, "dashboard_address": None}
    plan = plan_for(dataset, causal=True, chunks=13, partials=partials)
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as alone:
        assert carry_out(plan, dataset, fast_path / "result.zarr", alone).report.pairs == plan.problem.pairs


def test_lanes_share_one_head_and_the_bits_are_those_of_one(client: Client, fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(161, heads=2, kv_heads=1))
    plan = plan_for(dataset, causal=True, chunks=12, decomposition="strips", lanes=3)
    alone = carry_out(plan, dataset, fast_path / "alone.zarr", client)
    recorder = Recorder([])
    options = {"n_workers": 3, "threads_per_worker": 4, "processes": False, "memory_limit": 0, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as three:
        shared = carry_out(plan, dataset, fast_path / "shared.zarr", three, callbacks=[recorder])
    assert_same_bits(shared, alone)
    pairs = Counter[str]()
    for event in recorder.of("attended"):
        pairs[event.worker] += event.pairs
    assert len(pairs) == 3
    assert max(pairs.values()) < 0.4 * pairs.total()


def test_a_lane_that_cannot_be_made_leaves_nothing_on_the_workers(
    client: Client, dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Lane, *_: object, **__: object) -> None:
        raise MemoryError("no room for a lane")

    monkeypatch.setattr(Lane, "__init__", refuse)
    with pytest.raises(TaskError, match="the set-up of a lane failed: MemoryError: no room for a lane"):
        carry_out(plan_for(dataset), dataset, fast_path / "result.zarr", client)
    plugins = client.run(lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("oocattn")])
    assert not any(plugins.values())
