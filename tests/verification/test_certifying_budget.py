"""`verify` allocates no more than its budget, whatever it reads."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from support import MACHINE, carry_out, plan_for, write_dataset

import oocattn
from oocattn import BudgetError
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.make.synth import synthesise
from oocattn.verification.softmax import Tile

MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of 8 MiB and a dataset of 16 MiB, in chunks of 4 MiB."""
    folder = tmp_path_factory.mktemp("large")
    synthesise(folder / "dataset.zarr", tokens=16384, heads=2, kv_heads=1, head_dim=64, dtype="float32", mean=1)
    dataset = folder / "dataset.zarr"
    plan = plan_for(dataset, chunks=1, causal=True, machine=MACHINE)
    assert plan.out_chunk_rows == 16384
    carry_out(plan, dataset, folder / "result.zarr")
    return folder / "result.zarr"


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that Python and numpy had allocated at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def least_budget(result: Path, rows: int) -> int:
    with pytest.raises(BudgetError, match=r"host_memory 1 B is too small .*: the smallest that works is \d+MiB") as refused:
        oocattn.verify(result, host_memory=1, rows=rows)
    return int(re.search(r"(\d+)MiB$", str(refused.value))[1]) * MIB


@pytest.mark.parametrize("rows", [1, 20, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (64, 300))])
def test_the_budget_is_kept(large: Path, rows: int) -> None:
    """The smallest that works, which is that of the smallest tiles, and larger ones."""
    least = least_budget(large, rows)
    assert least <= 10 * MIB + rows * MIB // 30  # the sums of many rows, and their queries, are held whatever tiles are
    certificates, peaks = [], []
    for budget in (least, least + 4 * MIB, least + 20 * MIB, 256 * MIB):
        peaks.append(peak_of(lambda given=budget: certificates.append(oocattn.verify(large, rows=rows, host_memory=given))))
        assert peaks[-1] <= budget
    assert certificates[-1].passed, certificates[-1]
    assert peaks[-1] > least  # the budget did bind
    for certificate in certificates[:-1]:  # sums are added up in another order, and nothing else
        assert [(row.head, row.token, row.strata) for row in certificate.rows] == [
            (row.head, row.token, row.strata) for row in certificates[-1].rows
        ]
        assert certificate.passed


def test_many_threads_keep_the_budget_and_find_the_same(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that fit: the more, the more they hold."""
    monkeypatch.setattr("oocattn.verification.recompute.GROUP_ROWS", 8)
    found, peaks = [], []
    for cores, budget in ((1, 256 * MIB), (16, 256 * MIB), (16, 64 * MIB)):
        monkeypatch.setattr("oocattn.verification.budget.count_cores", lambda cores=cores: cores)
        peaks.append(peak_of(lambda given=budget: found.append(oocattn.verify(large, rows=80, host_memory=given))))
        assert peaks[-1] <= budget
    assert peaks[1] > 1.5 * peaks[0]
    assert found[0].passed
    assert [replace(certificate, made="") for certificate in found[1:]] == [replace(found[0], made="")] * 2


def test_few_rows_attend_more_keys_at_a_time_and_find_the_same(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, found, all_of = [], [], Tile.all_of
    monkeypatch.setattr(Tile, "all_of", lambda attended, keys: sizes.append(keys) or all_of(attended, keys))
    for rows, budget in ((8, "4GiB"), (8, "40MiB"), (200, "4GiB")):
        certificate = oocattn.verify(large, rows=rows, host_memory=budget)
        assert certificate.passed
        found.append((max(sizes), [(row.error, row.lse_error) for row in certificate.rows]))
        sizes.clear()
    assert [size for size, _ in found] == [32768, 4096, 8192]  # the second is what the budget has room for
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6, atol=1e-12)  # sums are added up in another order


def test_compressed_chunks_are_counted(large: Path, tmp_path: Path) -> None:
    old, new = zarr.open_group(large, mode="r"), zarr.open_group(tmp_path / "new.zarr", mode="w")
    new.attrs.update(old.attrs)
    for name in ("out", "lse"):
        new.create_array(name, data=old[name][...], chunks=old[name].chunks).attrs.update(old[name].attrs)
    least = least_budget(tmp_path / "new.zarr", 8)
    assert least >= 16 * MIB  # a chunk as it is stored and as it is decoded
    assert peak_of(lambda: oocattn.verify(tmp_path / "new.zarr", rows=8, host_memory=least)) <= least


def test_a_dataset_that_must_be_decoded_is_counted(large: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(large.with_name("dataset.zarr"))
    arrays = tuple(np.asarray(dataset.arrays[name].array[...]) for name in ("q", "k", "v"))
    compressed = write_dataset(tmp_path / "dataset.zarr", arrays, compressors="auto")
    with pytest.raises(BudgetError) as refused:
        oocattn.verify(large, host_memory=1, rows=8, inputs=compressed)
    least = int(re.search(r"(\d+)MiB$", str(refused.value))[1]) * MIB
    assert least >= 16 * MIB
    for budget in (least, least + 10 * MIB, 256 * MIB):  # with chunks that are kept, too
        assert peak_of(lambda given=budget: oocattn.verify(large, rows=8, host_memory=given, inputs=compressed)) <= budget
