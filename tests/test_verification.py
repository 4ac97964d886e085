"""A certificate is given to a right result and to no other: any wrong row that is sampled is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Certificate, IntegrityError, ProblemError

TOKENS, CHUNKS = 210, 7


@pytest.fixture(scope="module")
def finished(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and its right result."""
    folder = tmp_path_factory.mktemp("finished")
    dataset = write_dataset(folder / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, dtype="float16"), 50)
    carry_out(plan_for(dataset, causal=True, chunks=CHUNKS), dataset, folder / "result.zarr", client)
    return folder


@pytest.fixture
def result(finished: Path, tmp_path: Path) -> Path:
    """A copy of the result, to be spoilt."""
    shutil.copytree(finished / "result.zarr.oocattn", tmp_path / "result.zarr.oocattn")
    return Path(shutil.copytree(finished / "result.zarr", tmp_path / "result.zarr"))


def spoil(result: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    array = zarr.open_group(result, mode="r+")[name]
    data = array[...]
    change(data)
    array[...] = data


def sampled(certificate: Certificate) -> set[tuple[int, int]]:
    return {(row.head, row.token) for row in certificate.rows}


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 300])
def test_a_right_result_passes(result: Path, rows: int) -> None:
    certificate = oocattn.verify(result, rows=rows)
    assert certificate.passed
    assert certificate.dataset_unchanged
    assert 0 <= certificate.error < 4e-4
    assert 0.8 * rows <= len(certificate.rows) <= rows
    assert str(certificate).endswith("passed")


def test_ends_and_both_sides_of_borders_are_sampled(result: Path) -> None:
    tokens = {token for _, token in sampled(oocattn.verify(result, rows=64))}
    assert {0, TOKENS - 1} <= tokens
    borders = range(TOKENS // CHUNKS, TOKENS, TOKENS // CHUNKS)
    assert all({border - 1, border} <= tokens for border in borders)
    few = {token for _, token in sampled(oocattn.verify(result, rows=4))}
    assert {0, TOKENS - 1} <= few
    assert any({border - 1, border} <= few for border in borders)


def test_the_sample_follows_from_the_seed_and_covers_every_head(result: Path) -> None:
    first, again, other = (oocattn.verify(result, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert sampled(first) != sampled(other)
    assert {head for head, _ in sampled(first)} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["out", "lse"])
def test_one_wrong_row_fails_and_is_named(result: Path, name: str) -> None:
    head, token = sorted(sampled(oocattn.verify(result)))[17]
    spoil(result, name, lambda data: np.negative(data[0, head, token], out=data[0, head, token, ...]))
    certificate = oocattn.verify(result)
    assert not certificate.passed
    assert [(row.head, row.token) for row in certificate.rows if not row.passed] == [(head, token)]
    assert "FAILED: 1 of" in str(certificate)
    assert "WRONG" in next(line for line in str(certificate).splitlines() if f" {token} " in line)


@pytest.mark.parametrize("bit", [0x8000, 0x4000, 0x0400, 0x0080, 0x0040])
def test_one_flipped_bit_fails(result: Path, bit: int) -> None:
    """Of the element of a sampled row that is largest: the sign, the exponent, and the upper mantissa."""
    head, token = sorted(sampled(oocattn.verify(result)))[-1]

    def flip(data: np.ndarray) -> None:
        row = data[0, head, token]
        row.view(np.uint16)[np.abs(row).argmax()] ^= bit

    spoil(result, "out", flip)
    assert not oocattn.verify(result).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", ["out", "lse"])
def test_what_is_not_a_number_fails(result: Path, name: str, value: float) -> None:
    spoil(result, name, lambda data: data.fill(value))
    assert not any(row.passed for row in oocattn.verify(result).rows if row.token > 0)
    assert not oocattn.verify(result).passed


def test_swapped_chunks_fail(result: Path) -> None:
    files = sorted(path for path in (result / "out").rglob("*") if path.is_file() and path.name != "zarr.json")
    first, second = files[0], files[len(files) // 2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert not oocattn.verify(result).passed


def test_a_constant_added_to_lse_fails(result: Path) -> None:
    spoil(result, "lse", lambda data: np.add(data, 2e-3, out=data))
    assert not oocattn.verify(result).passed


def test_a_dataset_that_was_moved_is_named_and_one_that_was_changed_is_noticed(result: Path, tmp_path: Path) -> None:
    recorded = Path(zarr.open_group(result, mode="r").attrs["oocattn"]["dataset"]["location"])
    moved = shutil.copytree(recorded, tmp_path / "moved.zarr")
    certificate = oocattn.verify(result, dataset=moved)
    assert (certificate.passed, certificate.dataset) == (True, str(moved))
    changed = write_dataset(tmp_path / "changed.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, dtype="float16", seed=9))
    certificate = oocattn.verify(result, dataset=changed)
    assert not certificate.passed
    assert not certificate.dataset_unchanged
    assert "the dataset is not byte for byte the one that the run read" in str(certificate)


def test_another_problem_is_refused(result: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other.zarr", normal_arrays(TOKENS, heads=2, dtype="float16"))
    with pytest.raises(ProblemError, match="poses another problem"):
        oocattn.verify(result, dataset=other)


def test_where_there_is_no_result_there_is_no_certificate(tmp_path: Path, finished: Path) -> None:
    for path in (tmp_path / "nothing.zarr", finished / "dataset.zarr"):
        with pytest.raises(IntegrityError, match="no finished result here"):
            oocattn.verify(path)


def test_a_copied_result_needs_nothing_that_lay_beside_it(result: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(result, tmp_path / "copy.zarr")
    assert oocattn.verify(copy).passed


@pytest.mark.parametrize("attributes", [{}, {"problem": {}}, {"problem": {"batch": 1, "surprise": 2}}, {"problem": 7}])
def test_attributes_that_are_not_ours_are_refused(result: Path, attributes: dict) -> None:
    zarr.open_group(result, mode="r+").attrs["oocattn"] = attributes
    with pytest.raises(IntegrityError, match="do not describe a result"):
        oocattn.verify(result)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_a_small_constant_added_to_lse_fails_for_any_dtype_of_out(client: Client, tmp_path: Path, out_dtype: str) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(TOKENS, dtype="float32"), 50)
    carry_out(plan_for(dataset, out_dtype=out_dtype), dataset, tmp_path / "result.zarr", client)
    assert oocattn.verify(tmp_path / "result.zarr").passed
    spoil(tmp_path / "result.zarr", "lse", lambda data: np.add(data, 1e-4, out=data))
    assert not oocattn.verify(tmp_path / "result.zarr").passed


@pytest.mark.parametrize("values", ["cancelling", "tiny"])
def test_right_results_of_awkward_values_pass(client: Client, tmp_path: Path, values: str) -> None:
    q, k, v = normal_arrays(2048, dtype="float16" if values == "tiny" else "float32")
    if values == "cancelling":  # sums of thousands of values of 1 that leave thousandths
        q, k = q * np.float32(0.1), k * np.float32(0.1)
        v = v * np.float32(1e-3) + np.where(np.arange(2048) < 1024, 1, -1).astype("f4")[:, None]
    else:  # outputs among the subnormal numbers of float16
        v = (v.astype("f4") * 1e-4).astype("f2")
    dataset = write_dataset(tmp_path / "dataset.zarr", (q, k, v), 500)
    carry_out(plan_for(dataset), dataset, tmp_path / "result.zarr", client)
    certificate = oocattn.verify(tmp_path / "result.zarr")
    assert certificate.passed, certificate
    spoil(tmp_path / "result.zarr", "out", lambda data: np.add(data, 1e-3, out=data))
    assert not oocattn.verify(tmp_path / "result.zarr").passed


@pytest.mark.parametrize("options", [{"rows": 0}, {"seed": -1}])
def test_no_rows_prove_nothing(result: Path, options: dict[str, int]) -> None:
    with pytest.raises(ProblemError, match="at least one row"):
        oocattn.verify(result, **options)


def test_a_dataset_is_no_finished_result(finished: Path) -> None:
    assert oocattn.status(finished / "dataset.zarr").state == "none"
