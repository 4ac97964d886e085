"""Every worker gets a device: a GPU of its own where there are enough, whatever each of them sees."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import dask
import pytest
from distributed import Client, LocalCluster
from distributed.comm import inproc
from hypothesis import given
from hypothesis import strategies as st
from support import carry_out, plan_for

import oocattn
from oocattn import ProblemError
from oocattn.pipelines.engines.dask import cluster, local_cluster
from oocattn.pipelines.engines.dask.cluster import assign_devices, room_on, share_out, worker_addresses
from oocattn.pipelines.engines.dask.local_cluster import local_client


def gpus_of(visible: dict[str, list[str]]) -> dict[str, str]:
    """The name of the GPU that each worker was given."""
    return {worker: visible[worker][index] for worker, index in share_out(visible).items()}


@st.composite
def hosts(draw: st.DrawFn, most_workers: int) -> list[tuple[list[str], int]]:
    """GPUs of each host, and how many workers it has: up to `most_workers` for each GPU."""
    counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    names = [[f"host{host} GPU-{index}" for index in range(count)] for host, count in enumerate(counts)]
    return [(gpus, draw(st.integers(1, most_workers * len(gpus)))) for gpus in names]


def rotated(gpus: list[str], by: int) -> list[str]:
    """As CUDA_VISIBLE_DEVICES of workers that share a host is often set: each has another GPU first."""
    by %= len(gpus)
    return gpus[by:] + gpus[:by]


@given(hosts(most_workers=1), st.sampled_from(["all", "rotated", "one"]), st.randoms(use_true_random=False))
def test_each_has_its_own_where_there_are_enough(found: list[tuple[list[str], int]], sees: str, chance: Random) -> None:
    visible = {}
    for gpus, workers in found:
        for number in range(workers):
            views = {"all": gpus, "rotated": rotated(gpus, number), "one": [gpus[number]]}
            visible[f"{gpus[0]} worker {number}"] = views[sees]
    order = list(visible)
    chance.shuffle(order)
    given_out = gpus_of({worker: visible[worker] for worker in order})
    assert given_out.keys() == visible.keys()
    assert len(set(given_out.values())) == len(visible)
    assert all(gpu in visible[worker] for worker, gpu in given_out.items())


@given(hosts(most_workers=5), st.booleans())
def test_more_workers_than_gpus_are_spread_evenly(found: list[tuple[list[str], int]], turned: bool) -> None:
    visible = {
        f"{gpus[0]} worker {number}": rotated(gpus, number if turned else 0)
        for gpus, workers in found
        for number in range(workers)
    }
    taken = Counter(gpus_of(visible).values())
    for gpus, workers in found:
        shares = [taken[gpu] for gpu in gpus]
        assert sum(shares) == workers
        assert max(shares) - min(shares) <= 1


def test_a_machine_is_the_host_of_an_address_and_has_room_for_so_many() -> None:
    workers = ["tcp://10.0.0.1:1", "tls://10.0.0.1:2", "tcp://10.0.0.1:3", "tcp://10.0.0.2:1", "inproc://10.0.0.2/7/1"]
    assert list(filter(room_on((), 2), workers)) == [*workers[:2], *workers[3:]]
    assert list(filter(room_on(workers[:1], 2), workers[1:])) == [workers[1], *workers[3:]]


def test_share_out_takes_the_first_of_equal_gpus() -> None:
    assert share_out({"a": ["x", "y"], "b": ["y", "x"], "c": ["x", "y"], "d": ["y"]}) == {"a": 0, "b": 0, "c": 0, "d": 0}
    assert share_out({"a": ["x", "y"], "b": ["x", "y"]}) == {"a": 0, "b": 1}
    assert share_out({}) == {}


def test_on_the_cpu_every_worker_has_it(client: Client) -> None:
    assert assign_devices(client, "cpu", worker_addresses(client)) == dict.fromkeys(worker_addresses(client), "cpu")
    assert assign_devices(client, "cpu", []) == assign_devices(client, "cuda", []) == {}


def test_workers_are_found_while_the_client_renews_its_record(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other second a task of the client overwrites what it knows of the scheduler, without workers."""
    renewed = client.sync(client.scheduler.identity, n_workers=0)
    monkeypatch.setattr(client, "_scheduler_identity", renewed)
    monkeypatch.setattr(client, "_update_scheduler_info", lambda n_workers: asyncio.sleep(0))  # as if the task came last
    assert len(worker_addresses(client)) == renewed["n_workers"] > 0


def test_a_cluster_of_our_own_does_not_profile() -> None:
    with dask.config.set({"distributed.worker.profile.enabled": True}), local_client() as own:
        callbacks = own.run(lambda dask_worker: list(dask_worker.periodic_callbacks))
    assert callbacks
    assert all("profile" not in names for names in callbacks.values())


@pytest.mark.parametrize(("before", "after"), [(None, "127.0.0.1"), ("192.0.2.1", "192.0.2.1")])
def test_a_cluster_of_our_own_asks_for_no_way_to_the_internet_and_leaves_the_addresses_of_others(
    client: Client, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    """Dask asks for a way, to learn the address of this host, and warns where there is none.

    What it found lies in a record of the process. A worker at another address than that record says ends itself at its next
    heartbeat, and the scheduler cannot remove it, so the record that is tried here is one that no cluster uses.
    """
    assert local_cluster.inproc.global_manager is inproc.InProcBackend.manager  # the one that Dask uses
    record = inproc.Manager()
    record._ip = before
    monkeypatch.setattr(local_cluster, "inproc", SimpleNamespace(global_manager=record))
    with local_client():
        pass
    monkeypatch.setattr(inproc, "get_ip", lambda: pytest.fail("a way to the internet is asked for"))
    assert record.ip == after


def test_dask_does_not_log_the_tracebacks_of_tasks_in_a_cluster_of_our_own(caplog: pytest.LogCaptureFixture) -> None:
    worker = logging.getLogger("distributed.worker")
    worker.addHandler(caplog.handler)  # it does not propagate
    try:
        with local_client() as own, pytest.raises(ZeroDivisionError):
            own.submit(divmod, 1, 0).result()
    finally:
        worker.removeHandler(caplog.handler)
    assert "divmod" not in caplog.text


def test_a_run_does_not_begin_without_workers(dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal would not say what it was begun with, and no worker could resume it."""
    monkeypatch.setattr(cluster, "FIRST_WORKER_SECONDS", 0.3)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as nobody,
        Client(nobody, set_as_default=False) as client,
        pytest.raises(ProblemError, match=r"0 workers after 0\.3 s: a run needs at least one; start workers"),
    ):
        carry_out(plan_for(dataset), dataset, result, client)
    assert oocattn.status(result).state == "none"


def answering(found: dict[str, list[str]]) -> Callable[..., Awaitable[dict[str, list[str]]]]:
    async def answer(*_: object, **__: object) -> dict[str, list[str]]:
        return found

    return answer


def test_workers_that_see_no_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as workers,
        Client(workers, set_as_default=False) as client,
    ):
        first, second = worker_addresses(client)
        monkeypatch.setattr(cluster, "_visible_gpus", lambda: [])
        with pytest.raises(ProblemError, match=f"worker {first}, {second} sees no GPU: start workers where .*kernel='cpu'"):
            assign_devices(client, "cuda", [first, second])
        seen = iter([["host GPU-7"], []])
        monkeypatch.setattr(client, "run", answering(dict(zip((first, second), seen, strict=True))))
        with pytest.raises(ProblemError, match=f"^worker {second} sees no GPU"):
            assign_devices(client, "cuda", [first, second])
        monkeypatch.setattr(client, "run", answering({second: ["host a", "host b"], first: ["host b", "host a"]}))
        assert assign_devices(client, "cuda", [first, second]) == {first: "cuda:0", second: "cuda:0"}
