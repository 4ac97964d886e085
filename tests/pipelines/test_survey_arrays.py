"""What surveys take: parts of rows of bounded size, and files of sums as large as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from passes import planned
from support import normal_arrays, write_dataset

import oocattn
from oocattn.pipelines import driver, summing, survey_arrays
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.run import Run
from oocattn.storage.results.rows import RowReader


def test_rows_are_read_in_parts_of_bounded_size_and_give_the_same(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2, head_dim=16))
    result, read = oocattn.attention(dataset, fast_path / "result.zarr", engine="inline"), list[int]()

    class Reader(RowReader):
        def read(self, batch: int, head: int, start: int, out: NDArray[Any]) -> None:
            read.append(out.nbytes)
            super().read(batch, head, start, out)

    def bits() -> dict[str, bytes]:
        with planned(3):
            found = oocattn.survey(result.path, arrays=["entropy", "top_keys"], top=100, engine="inline", overwrite=True)
        return {name: np.asarray(array[...]).tobytes() for name, array in found.arrays.items()}

    expected = bits()
    monkeypatch.setattr(survey_arrays, "RowReader", Reader)
    monkeypatch.setattr(survey_arrays, "CHUNK_BYTES", 2000)
    assert bits() == expected
    assert max(read) <= 2000


@pytest.mark.parametrize("name", ["received", "pooled"])
def test_a_part_of_the_sums_takes_the_blocks_alone_that_meet_it(
    name: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=1, kv_heads=1, head_dim=16))
    result, real = oocattn.attention(dataset, fast_path / "result.zarr", engine="inline"), PartialFiles.read_sums
    read: list[PartialId] = []

    def spy(files: PartialFiles, partial: PartialId, buffers: Any) -> None:
        read.append(partial)
        real(files, partial, buffers)

    def bits() -> bytes:
        read.clear()
        with planned(7):
            found = oocattn.survey(result.path, arrays=[name], pool=170, engine="inline", overwrite=True)
        return np.asarray(found.arrays[name][...]).tobytes()

    monkeypatch.setattr(PartialFiles, "read_sums", spy)
    whole, files = bits(), len(set(read))
    parts = 10
    monkeypatch.setattr(summing, "MOST_HELD", 17 * (1 if name == "received" else 170))
    assert bits() == whole
    assert len(read) <= files * parts * 2 // 3


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
