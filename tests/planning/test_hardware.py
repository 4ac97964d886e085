"""What is measured of this machine is what a run will meet."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from made_up import MIB
from support import normal_arrays, write_dataset
from zarr.codecs import ZstdCodec

import oocattn
from oocattn import IntegrityError, ProblemError
from oocattn.planning import reading, timing
from oocattn.planning.reading import ASSUMED_RATE, PIECE_BYTES, input_cost, sample_rate
from oocattn.problem.arrays import ArraySpec
from oocattn.problem.options import ProblemOptions
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.dataset import Dataset, pose
from oocattn.storage.inputs.source import TensorSource

SECONDS = 0.02


class ColdArray:
    """An array of 64 MiB of which every place is slow to read once, from a disk that does one thing at a time."""

    dtype = np.dtype("float16")
    direct = True
    shared_heads = 1
    axes = Axes("bhnd")
    spec = ArraySpec("q", (1, 1, 1 << 19, 64), "float16")

    disk = threading.Lock()

    def __init__(self) -> None:
        self.read: set[int] = set()

    def read_heads(self, batch: int, heads: range, start: int, stop: int, outs: list[np.ndarray]) -> None:
        with self.disk:
            if start not in self.read:
                time.sleep(SECONDS)
            self.read.add(start)


@pytest.mark.parametrize("names", ["q", "qkv"])
def test_what_is_not_cached_is_measured_so(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TASKS", tmp_path)  # where threads wait for cores is the subject of test_timing
    arrays = {name: ColdArray() if name in names else SimpleNamespace(direct=False, axes=Axes("bhnd")) for name in "qkv"}
    dataset = SimpleNamespace(arrays=arrays)
    rate = sample_rate(dataset, "cpu").rate
    assert 0.5 * PIECE_BYTES["cpu"] / SECONDS < rate <= 1.5 * PIECE_BYTES["cpu"] / SECONDS
    assert sample_rate(dataset, "cpu").rate > 2 * rate  # now it is cached


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nobody counts what comes from a disk")
@pytest.mark.parametrize("compressors", [None, ZstdCodec()])
def test_a_plan_knows_whether_inputs_come_from_a_disk(tmp_path: Path, compressors: ZstdCodec | None) -> None:
    arrays = normal_arrays(60_000, head_dim=64, dtype="float16", heads=1)
    dataset = write_dataset(tmp_path / "dataset.zarr", arrays, compressors=compressors)
    for path in dataset.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = psutil.Process().io_counters().read_bytes
    plans = [oocattn.plan(dataset) for _ in range(2)]
    if psutil.Process().io_counters().read_bytes - before < MIB:
        pytest.skip("the file system keeps all in memory")
    assert [plan.machine.from_disk or plan.inputs.from_disk for plan in plans] == [True, False]


def test_what_comes_from_a_disk_is_unknown_where_nobody_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(300))
    monkeypatch.delattr(psutil.Process, "io_counters")
    assert oocattn.plan(dataset).machine.from_disk


def test_reads_that_all_fail_end_with_their_error() -> None:
    class NoArray(ColdArray):
        def read_heads(self, batch: int, heads: range, start: int, stop: int, outs: list[np.ndarray]) -> None:
            raise IntegrityError("gone")

    with pytest.raises(IntegrityError, match="gone"):
        sample_rate(SimpleNamespace(arrays={name: NoArray() for name in "qkv"}), "cpu")


@pytest.mark.parametrize("address", ["foo", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_refused(fast_path: Path, address: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(20))
    with pytest.raises(ProblemError, match=r"expected HOST:PORT, such as 127\.0\.0\.1:8787"):
        oocattn.attention(dataset, fast_path / "out.zarr", dashboard_address=address)
    assert [path.name for path in fast_path.iterdir()] == ["dataset.zarr"]


def test_a_rate_is_that_of_all_bytes_that_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 2, 8, 16), "k": (1, 2, 4096, 16), "v": (1, 2, 4096, 16)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    dataset = Dataset.open(write_dataset(tmp_path / "dataset.zarr", tuple(arrays.values()), 512, compressors=ZstdCodec()))
    rates = {"q": 1e5, "k": 1e9, "v": 2e9}
    monkeypatch.setattr(reading, "read_rate", lambda array, *_: reading.Rate(rates[array.name], from_disk=False))
    found = input_cost(dataset, pose(dataset, ProblemOptions()), host_memory=1 << 30)
    seconds = sum(array.nbytes / rates[name] for name, array in arrays.items())
    assert found.decode_rate == pytest.approx(sum(array.nbytes for array in arrays.values()) / seconds)


def test_decoding_is_measured_by_decoding_and_assumed_where_no_budget_holds_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64), 16, compressors=ZstdCodec())
    dataset = Dataset.open(stored)
    problem, read, rows_read = pose(dataset, ProblemOptions()), TensorSource.read_rows, []

    def note(source: TensorSource, *given: Any) -> None:
        rows_read.append((source.name, given[3] - given[2]))
        read(source, *given)

    monkeypatch.setattr(TensorSource, "read_rows", note)
    assert input_cost(dataset, problem, host_memory=0).decode_rate == pytest.approx(ASSUMED_RATE)
    assert not rows_read
    found = input_cost(dataset, problem, host_memory=1 << 30)
    assert set(rows_read) == {(name, 64) for name in "qkv"}
    assert 0 < found.decode_rate != ASSUMED_RATE
    assert found.align_rows == 16
    assert all(re.search(r": read through Zarr's codecs, [\d.e+-]+ GB/s$", note) for note in found.notes)
    assert len(found.notes) == 3
