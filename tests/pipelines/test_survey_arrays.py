"""What surveys take: parts of rows of bounded size, and files of sums as large as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from passes import bits, planned
from support import normal_arrays, write_dataset

import oocattn
from oocattn.pipelines import driver, summing, survey, survey_arrays
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.run import Run
from oocattn.storage.results.rows import RowReader
from oocattn.threads import ThreadPool


def test_rows_are_read_in_parts_of_bounded_size_and_give_the_same(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2, head_dim=16))
    result, read = oocattn.attention(dataset, fast_path / "result.zarr", engine="inline"), list[int]()

    class Reader(RowReader):
        def read(self, batch: int, head: int, start: int, out: NDArray[Any]) -> None:
            read.append(out.nbytes)
            super().read(batch, head, start, out)

    def found() -> dict[str, bytes]:
        with planned(3):
            return bits(
                oocattn.survey(result.path, arrays=["entropy", "top_keys"], top=100, engine="inline", overwrite=True)
            )

    expected = found()
    monkeypatch.setattr(survey_arrays, "RowReader", Reader)
    monkeypatch.setattr(survey_arrays, "CHUNK_BYTES", 2000)
    assert found() == expected
    assert max(read) <= 2000


@pytest.mark.parametrize("name", ["received", "pooled"])
def test_blocks_are_read_once_and_where_parts_are_held_one_by_one_those_alone_that_meet_them(
    name: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=1, kv_heads=1, head_dim=16))
    result, real = oocattn.attention(dataset, fast_path / "result.zarr", engine="inline"), PartialFiles.read_sums
    read: list[PartialId] = []

    def spy(files: PartialFiles, partial: PartialId, buffers: Any) -> None:
        read.append(partial)
        real(files, partial, buffers)

    def found() -> bytes:
        read.clear()
        with planned(7):
            return bits(oocattn.survey(result.path, arrays=[name], pool=170, engine="inline", overwrite=True))[name]

    monkeypatch.setattr(PartialFiles, "read_sums", spy)
    whole, files = found(), len(set(read))
    parts = 10
    monkeypatch.setattr(summing, "MOST_IN_CHUNKS", 17 * (1 if name == "received" else 170))
    assert found() == whole
    assert len(read) == files, "parts that are held together"
    monkeypatch.setattr(summing, "_room", lambda plan: 0)
    assert found() == whole
    assert files * 2 <= len(read) <= files * parts * 2 // 3


@pytest.mark.parametrize(("cores", "room", "threads"), [(1, 1 << 30, 1), (5, 1 << 30, 5), (5, 0, 1)])
def test_as_many_threads_as_cores_and_memory_allow_make_arrays_of_the_same_bits(
    cores: int, room: int, threads: int, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=6, kv_heads=3, head_dim=16))
    result, counts = oocattn.attention(dataset, fast_path / "result.zarr", engine="inline"), list[int]()

    def found() -> dict[str, bytes]:
        with planned(3):
            return bits(oocattn.survey(result.path, pool=17, engine="inline", overwrite=True))

    class Pool(ThreadPool):
        def __init__(self, count: int, name: str) -> None:
            counts.append(count)
            super().__init__(count, name)

    expected = found()
    monkeypatch.setattr(summing, "_room", lambda plan: room)
    monkeypatch.setattr(survey, "default_host_memory", lambda: room)
    for module in (summing, survey_arrays):
        monkeypatch.setattr(module, "ThreadPool", Pool)
        monkeypatch.setattr(module, "count_cores", lambda: cores)
        monkeypatch.setattr(module, "THREAD_BYTES", 1)
    assert found() == expected
    assert counts == [threads, threads]


@pytest.mark.parametrize("arrays", [["received"], ["pooled"], ["received", "entropy", "pooled"]], ids=",".join)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("division", "chunks"), [("cqs", 1), ("cqs", 7), ("strips", 5)])
def test_files_of_sums_are_no_larger_than_the_plan_says(
    division: str, chunks: int, causal: bool, arrays: list[str], fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(600, heads=4, kv_heads=2, head_dim=16))
    result, found = oocattn.attention(dataset, fast_path / "result.zarr", causal=causal, engine="inline"), list[int]()

    def write(run: Run, check: Callable[[], object]) -> None:
        written = sum(path.stat().st_size for path in run.paths.scratch.glob("sums-*"))
        found.extend((written, run.plan.scratch_disk))
        summing.write_sums(run, check)

    monkeypatch.setattr(driver, "write_sums", write)
    with planned(chunks, division):
        oocattn.survey(result.path, arrays=arrays, pool=600, engine="inline")
    written, counted = found
    assert written <= counted <= 2 * written + (1 << 20)
