"""`certify` with a second pass: every row of a stored result is compared, within the budget, and the certificate says so."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from second_passes import SEED, second_pass, stored_pass
from support import carry_out, normal_arrays, plan_for, write_dataset

from oocattn import BudgetError, Certificate, IntegrityError
from oocattn.storage.files.durable import read_json
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.summary import read_summary
from oocattn.verification.all_rows import AllRowsArrays
from oocattn.verification.certify import certify, write_certificate

TOKENS, HEADS = 210, 4
ASKED: dict[str, Any] = {"causal": True, "window_size": (99, 0), "heads": [0, 1, 3], "queries": (8, 200)}
ROWS = 3 * 192
MIB = 1 << 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AllRowsArrays]:
    """A result of some heads and rows, and a second pass over it."""
    folder = tmp_path_factory.mktemp("finished")
    arrays = normal_arrays(TOKENS, heads=HEADS, kv_heads=2, head_dim=64, dtype="float16")
    dataset = write_dataset(folder / "dataset.zarr", arrays, 50)
    result = carry_out(plan_for(dataset, chunks=7, **ASKED), dataset, folder / "result.zarr")
    passed = second_pass(arrays, np.asarray(result.lse[...]), SEED, **ASKED)
    return folder / "result.zarr", stored_pass(folder / "pass.zarr", *passed)


@pytest.fixture
def result(finished: tuple[Path, AllRowsArrays], fast_path: Path) -> Path:
    """A copy of the result, to be spoilt."""
    return Path(shutil.copytree(finished[0], fast_path / "result.zarr"))


@pytest.fixture
def passed(finished: tuple[Path, AllRowsArrays]) -> AllRowsArrays:
    return finished[1]


def certify_all(result: Path, passed: AllRowsArrays | None, **options: Any) -> Certificate:
    usual = {"rows": 8, "seed": 1, "inputs": None, "host_memory": 256 * MIB, "checksums": False}
    paths = ResultPaths.at(result)
    found = certify(paths, ResultArrays.open(result), **{**usual, **options}, all_rows=passed)
    return write_certificate(found, paths)


def spoil(result: Path, head: int, row: int) -> None:
    """Scale a row of `out` by 1.01."""
    out = zarr.open_group(result, mode="r+")["out"]
    out[0, head, row] = (1.01 * out[0, head, row].astype(np.float64)).astype(np.float16)


def test_a_right_result_passes_with_all_rows(result: Path, passed: AllRowsArrays) -> None:
    certificate = certify_all(result, passed)
    found = certificate.all_rows
    assert certificate.passed
    assert found is not None
    assert (found.rows, found.vectors, found.seed, found.suspected, found.wrong_rows) == (ROWS, 8, SEED, 0, 0)
    assert (found.computed_by, found.other) == ("kernel numpy, strips", True)
    assert "every one of 576 rows was compared with a second pass" in certificate.statement
    assert "576 compared in lse and 8 sums of out with random signs, by another kernel and division" in str(certificate)
    assert "--all-rows" in certificate.again
    written = ResultPaths.at(result).state / "certificate.json"
    assert Certificate.from_json(read_json(written)) == certificate
    summary = read_summary(ResultPaths.at(result))
    assert summary is not None
    assert summary.outcome == "passed"


def test_without_a_pass_nothing_is_said_of_all_rows(result: Path) -> None:
    certificate = certify_all(result, None)
    assert certificate.all_rows is None
    assert "second pass" not in str(certificate)


@pytest.mark.parametrize(("head", "row"), [(0, 0), (1, 57), (2, 191)])
def test_any_row_that_is_spoilt_fails_the_certificate(result: Path, passed: AllRowsArrays, head: int, row: int) -> None:
    """Also where the sample lacks it, and with the head and the row counted as in `out`."""
    spoil(result, head, row)
    certificate = certify_all(result, passed, rows=1, seed=3)
    assert certificate.failed
    assert not certificate.wrong
    assert [(found.head, found.token) for found in certificate.named_wrong] == [(head, row)]
    assert f"FAILED: 1 of {ROWS} rows, found by a second pass, is wrong" in certificate.verdict
    assert "WRONG" in str(certificate)
    assert "95%" not in certificate.statement
    page = (ResultPaths.at(result).state / "certificate.html").read_text()
    assert "WRONG" in page
    assert "All rows" in page


def test_a_part_that_is_missing_is_wrong_from_its_first_row_on(result: Path, passed: AllRowsArrays) -> None:
    file = sorted((result / "out").glob("c.0.1.*"))[1]
    rows = zarr.open_group(result, mode="r")["out"].chunks[2]
    file.unlink()
    found = certify_all(result, passed, rows=1).all_rows
    assert found is not None
    assert found.wrong_rows >= rows
    assert {(row.head, row.token // rows) for row in found.wrong} == {(1, 1)}
    assert found.suspected <= 96  # the other half of its head is readable, and right


def test_several_threads_find_what_one_does(result: Path, passed: AllRowsArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a part that cannot be read, and rows of NaN."""
    spoil(result, 2, 191)
    zarr.open_group(result, mode="r+")["out"][0, 0, 3:6] = np.nan
    sorted((result / "lse").glob("c.0.1.*"))[1].unlink()
    found = []
    for cores in (1, 2, 7):
        monkeypatch.setattr("oocattn.verification.budget.count_cores", lambda cores=cores: cores)
        found.append(str(certify_all(result, passed)))
    assert found[0] == found[1] == found[2]
    assert "WRONG" in found[0]


def test_more_that_differ_than_are_recomputed_leave_it_inconclusive(
    result: Path, finished: tuple[Path, AllRowsArrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that is wrong itself accuses right rows, and fails none."""
    monkeypatch.setattr("oocattn.verification.all_rows.MOST_RECOMPUTED", 16)
    arrays = finished[1].arrays
    out, lse = np.asarray(arrays.out[...]), np.asarray(arrays.lse[...])
    for count, inconclusive in ((9, False), (40, True)):
        out[0, 2, :count] += 1
        certificate = certify_all(result, stored_pass(tmp_path / "pass.zarr", out, lse))
        found = certificate.all_rows
        assert found is not None
        assert (found.suspected, found.recomputed, found.wrong_rows) == (count, min(count, 16), 0)
        assert (certificate.passed, certificate.inconclusive) == (not inconclusive, inconclusive)
    assert certificate.verdict == (
        "inconclusive: 40 rows differ from a second pass, and only 16 of them were recomputed, which are right"
    )


def test_a_pass_over_another_result_is_refused(result: Path, finished: tuple[Path, AllRowsArrays], tmp_path: Path) -> None:
    arrays = finished[1].arrays
    out, lse = np.asarray(arrays.out[...]), np.asarray(arrays.lse[...])
    for wrong in ((out[:, :, 1:], lse), (out, lse[:, 1:]), (out.astype(np.float64), lse), (out[..., :7], lse)):
        with pytest.raises(IntegrityError, match=r"expected float32 \[.*, of a second pass over such a result"):
            certify_all(result, stored_pass(tmp_path / "pass.zarr", *wrong))
    whole = stored_pass(tmp_path / "pass.zarr", out, lse)
    next((tmp_path / "pass.zarr").glob("**/c/0/1/1*")).rename(tmp_path / "moved")
    with pytest.raises(IntegrityError, match=re.escape(str(tmp_path / "pass.zarr"))):
        certify_all(result, whole)


@pytest.mark.parametrize("cores", [1, 16])
@pytest.mark.parametrize("compressors", [None, "auto"])
def test_the_budget_is_kept_with_a_pass(
    tmp_path: Path, compressors: str | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many rows are recomputed, and where chunks of the pass are decoded."""
    monkeypatch.setattr("oocattn.verification.all_rows.MOST_RECOMPUTED", 20)
    monkeypatch.setattr("oocattn.verification.budget.count_cores", lambda: cores)
    tokens = 4000
    arrays = normal_arrays(tokens, heads=1, head_dim=256)
    dataset = write_dataset(tmp_path / "dataset.zarr", arrays)
    carry_out(plan_for(dataset, chunks=1, causal=True), dataset, tmp_path / "result.zarr")
    accusing = np.ones((1, 1, tokens, 8), np.float32), np.ones((1, 1, tokens), np.float32)
    passed = stored_pass(tmp_path / "pass.zarr", *accusing, compressors)
    with pytest.raises(BudgetError) as refused:
        certify_all(tmp_path / "result.zarr", passed, host_memory=1)
    least = int(re.search(r"(\d+)MiB$", str(refused.value))[1]) * MIB  # type: ignore[index]
    assert least <= 16 * MIB
    for budget in (least, least + 8 * MIB, least + 50 * MIB):
        tracemalloc.start()
        try:
            certificate = certify_all(tmp_path / "result.zarr", passed, host_memory=budget)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= budget
        assert certificate.all_rows is not None
        assert certificate.all_rows.recomputed == 20
