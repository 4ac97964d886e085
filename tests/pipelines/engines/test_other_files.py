"""A run does not begin on workers that see other files than the driver, and such workers join none."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array
import pytest
from distributed import Client
from support import Recorder, assert_same_bits, carry_out, damage, normal_arrays, plan_for, write_dataset
from worker_processes import cluster_of, command, start

import oocattn
from oocattn import ProblemError, TaskError
from oocattn.pipelines.attempt import Attempt
from oocattn.pipelines.engines.dask import engine
from oocattn.pipelines.engines.dask.enlisting import Roll, call_roll
from oocattn.pipelines.engines.dask.readiness import (
    Expectations,
)

PINNED: Any = {"kernel": "cpu", "chunks": 7, "decomposition": "cqs"}
"""What gives the same bits: for two workers a plan may choose another division than for one."""


@dataclass(frozen=True)
class Elsewhere:
    """A cluster of two workers, one of which sees other things at some paths below `folder`."""

    client: Client
    folder: Path
    odd: str
    """The address of that worker."""


MOUNTS = """
set -e
cd "$1"; shift
mount --bind old.zarr changed.zarr
mount --bind touched.zarr timed.zarr
mount -t tmpfs none absent
mount -t tmpfs none private
mkdir private/result.zarr.oocattn
mount --bind sealed sealed
mount -o remount,bind,ro sealed
mount -t tmpfs none upper
mkdir upper/files upper/work
mount -t overlay -o lowerdir=layered,upperdir=upper/files,workdir=upper/work none layered
exec "$@"
"""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, cluster_of(2) as (client, ending):
        folder = Path(name)
        for each in ("absent", "private", "sealed", "layered", "upper"):
            (folder / each).mkdir()
        arrays = normal_arrays(170, heads=2)
        write_dataset(folder / "changed.zarr", arrays)
        shutil.copytree(folder / "changed.zarr", folder / "old.zarr")  # with its times
        times = (folder / "old.zarr/k/c/0/0/0/0").stat()
        damage(folder / "old.zarr/k/c/0/0/0/0", lambda content: b"\x01" + content[1:])
        os.utime(folder / "old.zarr/k/c/0/0/0/0", ns=(times.st_atime_ns, times.st_mtime_ns))
        shutil.copytree(folder / "changed.zarr", folder / "timed.zarr")
        shutil.copytree(folder / "timed.zarr", folder / "touched.zarr")
        os.utime(folder / "touched.zarr/v/c/0/0/0/0")
        shutil.copytree(folder / "changed.zarr", folder / "absent/dataset.zarr")
        path = str(Path(oocattn.__file__).parents[1])
        address = client.scheduler.address
        start(ending, command(address), PYTHONPATH=path)
        client.wait_for_workers(1, timeout=60)
        (plain,) = client.nthreads()
        start(ending, ["unshare", "-rm", "sh", "-c", MOUNTS, "sh", str(folder), *command(address)], PYTHONPATH=path)
        client.wait_for_workers(2, timeout=60)
        (odd,) = client.nthreads().keys() - {plain}
        yield Elsewhere(client, folder, odd)


@pytest.mark.parametrize(
    ("dataset", "result", "words"),
    [
        ("changed.zarr", "r.zarr", "sees other data in k of the dataset {}/changed.zarr than is here"),
        ("timed.zarr", "r.zarr", "sees v of the dataset {}/timed.zarr with other modification times than here"),
        ("absent/dataset.zarr", "r.zarr", "cannot read the dataset {}/absent/dataset.zarr as it can be read here"),
        ("old.zarr", "private/result.zarr", "sees another folder {}/private/result.zarr.oocattn than is here"),
        ("old.zarr", "sealed/result.zarr", "cannot write to {}/sealed/result.zarr.oocattn (Read-only file system)"),
        ("old.zarr", "layered/result.zarr", "writes to {}/layered/result.zarr.oocattn, and nothing of that appears here"),
        ("changed.zarr", "sealed/result.zarr", "(rsync -a), and cannot write to {}/sealed/result.zarr.oocattn"),
    ],
)
def test_a_worker_that_sees_other_files_is_named_before_anything_is_written(
    elsewhere: Elsewhere, dataset: str, result: str, words: str
) -> None:
    folder = elsewhere.folder
    before = sorted(folder.rglob("*"))
    with pytest.raises(ProblemError) as refused:
        oocattn.attention(folder / dataset, folder / result, client=elsewhere.client, kernel="cpu")
    text = str(refused.value)
    assert text.startswith("the cluster is not ready for this run: worker ")
    assert words.format(folder) in text
    assert elsewhere.odd in text
    assert text.count("worker tcp://") == 1
    assert sorted(folder.rglob("*")) == before


def test_workers_that_see_the_same_files_share_a_run(elsewhere: Elsewhere, result: Path, client: Client) -> None:
    dataset = elsewhere.folder / "old.zarr"
    found = oocattn.attention(dataset, elsewhere.folder / "whole.zarr", client=elsewhere.client, **PINNED)
    assert_same_bits(found, oocattn.attention(dataset, result, client=client, **PINNED))


def test_arrays_of_dask_are_computed_by_workers_in_other_processes(elsewhere: Elsewhere, result: Path) -> None:
    arrays = dict(zip("qkv", normal_arrays(170, heads=2), strict=True))
    lazy = {name: dask.array.from_array(each, chunks=(1, 2, 64, 8)) for name, each in arrays.items()}
    found = oocattn.attention(lazy, elsewhere.folder / "dask.zarr", client=elsewhere.client, **PINNED)
    assert_same_bits(found, oocattn.attention(arrays, result, engine="inline", **PINNED))


def test_what_only_this_process_has_is_refused_with_what_helps(elsewhere: Elsewhere, result: Path) -> None:
    q, *_ = normal_arrays(170, heads=2)
    persisted = elsewhere.client.persist(dask.array.from_array(q, chunks=(1, 2, 64, 8)))
    unsendable = dask.array.from_array(q).map_blocks(lambda block, _: block, threading.Lock(), dtype=q.dtype)
    for given in (q, persisted, unsendable):
        inputs = {"q": given, "k": given, "v": given}
        with pytest.raises(ProblemError, match=r"q is an object of process .*\.to_zarr.* or leave client out") as refused:
            oocattn.attention(inputs, elsewhere.folder / "memory.zarr", client=elsewhere.client, kernel="cpu")
        assert "rsync" not in str(refused.value)
        assert (
            oocattn.attention(inputs, result, engine="inline", kernel="cpu", chunks=7, overwrite=True).out.shape == q.shape
        )


def test_a_worker_that_comes_later_and_sees_other_data_takes_no_part(
    elsewhere: Elsewhere, result: Path, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, drive, failed = elsewhere.folder / "changed.zarr", Attempt.drive, []

    def fail_once(attempt: Attempt) -> None:
        failed or failed.append(attempt) or raising(TaskError("subproblem 0 of head group 0", "a mishap"))
        drive(attempt)

    def raising(error: Exception) -> None:
        raise error

    def enlist_first(connected: Client, expected: Expectations, check: Callable[[], object]) -> Roll:
        return Roll(call_roll(connected, expected, check).ready)  # as if the other had not been there yet

    monkeypatch.setattr(Attempt, "drive", fail_once)
    monkeypatch.setattr(engine, "enlist", enlist_first)
    plan = plan_for(dataset, chunks=7, lanes=2)
    recorder = Recorder([])
    found = carry_out(plan, dataset, elsewhere.folder / "later.zarr", elsewhere.client, callbacks=[recorder])
    assert_same_bits(found, carry_out(plan, dataset, result, client))
    assert found.report.retried == 1
    assert f"worker {elsewhere.odd}" in caplog.text
    assert "sees other data in k of the dataset" in caplog.text
    assert "; it takes no part" in caplog.text
    assert len({event.worker for event in recorder.of("attended")}) == 1
