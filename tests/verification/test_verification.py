"""A certificate is given to a right result and to no other: any wrong row that is sampled is found.

But for the last tests, by recomputing rows alone; what checksums find is in test_certifying.py.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Certificate, IntegrityError, ProblemError
from oocattn.cli.main import main

TOKENS, CHUNKS = 210, 7


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and its right result."""
    folder = tmp_path_factory.mktemp("finished")
    dataset = write_dataset(folder / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, dtype="float16"), 50)
    carry_out(plan_for(dataset, causal=True, chunks=CHUNKS), dataset, folder / "result.zarr")
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
    few = {token for _, token in sampled(oocattn.verify(result, rows=16))}
    assert {0, TOKENS - 1} <= few
    assert any({border - 1, border} <= few for border in borders)
    assert {0, TOKENS - 1} <= {token for _, token in sampled(oocattn.verify(result, rows=3))}


def test_the_sample_follows_from_the_seed_and_covers_every_head(result: Path) -> None:
    first, again, other = (oocattn.verify(result, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert sampled(first) != sampled(other)
    assert {head for head, _ in sampled(first)} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_certificate_with_one_wrong_row_fails_and_names_it(result: Path, name: str) -> None:
    head, token = sorted(sampled(oocattn.verify(result)))[17]
    spoil(result, name, lambda data: np.negative(data[0, head, token], out=data[0, head, token, ...]))
    certificate = oocattn.verify(result, checksums=False)
    assert not certificate.passed
    assert [(row.head, row.token) for row in certificate.rows if not row.passed] == [(head, token)]
    assert "FAILED: 1 of" in str(certificate)
    assert "WRONG" in next(line for line in str(certificate).splitlines() if f" {token} " in line)


@pytest.mark.parametrize("bit", [0x8000, 0x4000, 0x0400, 0x0080, 0x0040])
def test_a_certificate_fails_where_one_bit_is_flipped(result: Path, bit: int) -> None:
    """Of the element of a sampled row that is largest: the sign, the exponent, and the upper mantissa."""
    head, token = sorted(sampled(oocattn.verify(result)))[-1]

    def flip(data: np.ndarray) -> None:
        row = data[0, head, token]
        row.view(np.uint16)[np.abs(row).argmax()] ^= bit

    spoil(result, "out", flip)
    assert not oocattn.verify(result, checksums=False).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", ["out", "lse"])
def test_nan_in_the_result_fails(result: Path, name: str, value: float) -> None:
    spoil(result, name, lambda data: data.fill(value))
    assert not any(row.passed for row in oocattn.verify(result).rows if row.token > 0)
    assert not oocattn.verify(result, checksums=False).passed


def test_a_constant_added_to_lse_fails(result: Path) -> None:
    spoil(result, "lse", lambda data: np.add(data, 2e-3, out=data))
    assert not oocattn.verify(result, checksums=False).passed


def test_a_dataset_that_was_moved_is_named_and_one_that_was_changed_is_noticed(result: Path, tmp_path: Path) -> None:
    recorded = Path(zarr.open_group(result, mode="r").attrs["oocattn"]["dataset"]["location"])
    moved = shutil.copytree(recorded, tmp_path / "moved.zarr")
    certificate = oocattn.verify(result, inputs=moved)
    assert (certificate.passed, certificate.dataset) == (True, str(moved))
    changed = write_dataset(tmp_path / "changed.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, dtype="float16", seed=9))
    with pytest.raises(IntegrityError, match=r"changed.zarr is not what the run to .* read: numbers of q, k and v differ"):
        oocattn.verify(result, inputs=changed)


def test_another_problem_is_refused(result: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other.zarr", normal_arrays(TOKENS, heads=2, dtype="float16"))
    with pytest.raises(
        ProblemError, match=r"another problem than the result's \(query heads 4, now 2; kv heads 2, now 1\): .*inputs$"
    ):
        oocattn.verify(result, inputs=other)


def test_a_place_without_a_result_has_no_certificate(tmp_path: Path, finished: Path) -> None:
    for path in (tmp_path / "nothing.zarr", finished / "dataset.zarr"):
        with pytest.raises(IntegrityError, match="no finished result here"):
            oocattn.verify(path)


def changed(*path: str, to: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda attributes: attributes.clear(),
        *(changed(name, to=value) for name in ("problem", "dataset", "plan", "versions") for value in (None, 7, [], "text")),
        *(changed(name, to={}) for name in ("problem", "dataset", "plan")),
        changed("problem", "batch", to=0),
        changed("problem", "queries", to=True),
        changed("problem", "head_dim", to=1025),
        changed("problem", "kv_heads", to=3),
        changed("problem", "dtype", to="float64"),
        changed("problem", "scale", to="nan"),
        changed("problem", "surprise", to=2),
        *(changed("problem", "window_size", to=value) for value in ([-1, None], [2**70, None], [3], [2**63 - 1, 0])),
        *(changed("problem", name, to=2**63) for name in ("prefix", "sink_tokens", "bias_heads")),
        changed("problem", "rows_asked", to=[5, 211]),
        changed("problem", "heads", to=[2, 1]),
        changed("dataset", "location", to=5),
        changed("dataset", "fingerprint", to=None),
        changed("plan", "chunk_rows", to=0),
        changed("plan", "chunk_rows", to="30"),
        changed("plan", "kernel", to=1),
        changed("versions", "zarr", to=3),
    ],
)
def test_attributes_that_are_not_ours_are_refused(result: Path, change: Callable[[dict], None]) -> None:
    group = zarr.open_group(result, mode="r+")
    attributes = copy.deepcopy(group.attrs["oocattn"])
    change(attributes)
    group.attrs["oocattn"] = attributes
    with pytest.raises(IntegrityError, match="do not describe a result"):
        oocattn.verify(result)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_a_small_constant_added_to_lse_fails_for_any_dtype_of_out(tmp_path: Path, out_dtype: str) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(TOKENS, dtype="float32"), 50)
    carry_out(plan_for(dataset, out_dtype=out_dtype), dataset, tmp_path / "result.zarr")
    assert oocattn.verify(tmp_path / "result.zarr").passed
    spoil(tmp_path / "result.zarr", "lse", lambda data: np.add(data, 1e-4, out=data))
    assert not oocattn.verify(tmp_path / "result.zarr", checksums=False).passed


@pytest.mark.parametrize("values", ["cancelling", "tiny"])
def test_right_results_of_awkward_values_pass(tmp_path: Path, values: str) -> None:
    q, k, v = normal_arrays(2048, dtype="float16" if values == "tiny" else "float32")
    if values == "cancelling":  # sums of thousands of values of 1 that leave thousandths
        q, k = q * np.float32(0.1), k * np.float32(0.1)
        v = v * np.float32(1e-3) + np.where(np.arange(2048) < 1024, 1, -1).astype("f4")[:, None]
    else:  # outputs among the subnormal numbers of float16
        v = (v.astype("f4") * 1e-4).astype("f2")
    dataset = write_dataset(tmp_path / "dataset.zarr", (q, k, v), 500)
    carry_out(plan_for(dataset), dataset, tmp_path / "result.zarr")
    certificate = oocattn.verify(tmp_path / "result.zarr")
    assert certificate.passed, certificate
    spoil(tmp_path / "result.zarr", "out", lambda data: np.add(data, 1e-3, out=data))
    assert not oocattn.verify(tmp_path / "result.zarr", checksums=False).passed


def test_rows_of_which_float32_keeps_nothing_are_inconclusive(tmp_path: Path) -> None:
    """Scores near 1e6 that differ by less than their rounding errors: right or not, such rows show nothing."""
    q, k, v = normal_arrays(200, head_dim=64)
    dataset = write_dataset(tmp_path / "dataset.zarr", (q + 350, k + 350, v), 50)
    carry_out(plan_for(dataset, chunks=3), dataset, tmp_path / "result.zarr")
    certificate = oocattn.verify(tmp_path / "result.zarr")
    assert (certificate.passed, certificate.inconclusive, certificate.wrong) == (False, True, [])
    assert "rows show nothing" in certificate.verdict
    assert main(["verify", str(tmp_path / "result.zarr")]) == 3
    spoil(tmp_path / "result.zarr", "out", lambda data: data.fill(0))
    assert main(["verify", str(tmp_path / "result.zarr"), "--no-checksums"]) != 0
    assert main(["verify", str(tmp_path / "result.zarr")]) == 1  # which the checksums show


def test_large_scores_that_leave_one_key_are_checked(tmp_path: Path) -> None:
    """A score counts as much as its key weighs: such rows are their values, and zeros are found."""
    q, k, v = normal_arrays(200, head_dim=64)
    dataset = write_dataset(tmp_path / "dataset.zarr", (q * 1e3, k * 1e3, v), 50)
    carry_out(plan_for(dataset, chunks=3), dataset, tmp_path / "result.zarr")
    assert not oocattn.verify(tmp_path / "result.zarr").failed
    spoil(tmp_path / "result.zarr", "out", lambda data: data.fill(0))
    assert oocattn.verify(tmp_path / "result.zarr", checksums=False).failed


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_attend_only_minus_infinity_are_zeros_and_checked(tmp_path: Path, causal: bool) -> None:
    q, k, v = normal_arrays(90)
    q[..., 0] = 1
    k[..., : 30 if causal else 90, 0] = -np.inf
    dataset = write_dataset(tmp_path / "dataset.zarr", (q, k, v), 20)
    carry_out(plan_for(dataset, causal=causal, chunks=3), dataset, tmp_path / "result.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate = oocattn.verify(tmp_path / "result.zarr", rows=180)
    assert (certificate.passed, certificate.showing_nothing) == (True, [])
    assert certificate.error < 1e-6
    for name, change in {"out": 1e-6, "lse": 1.0}.items():
        with zarr.config.set({"array.write_empty_chunks": True}):  # of zeros
            spoil(tmp_path / "result.zarr", name, lambda data, change=change: data[:, :, 10].fill(change))
        assert {row.token for row in oocattn.verify(tmp_path / "result.zarr", rows=180).wrong} == {10}


@pytest.mark.parametrize("constant", [-1e9, -1e37, -3e38])
def test_keys_that_a_large_constant_masks_leave_rows_that_show_something(tmp_path: Path, constant: float) -> None:
    q, k, v = normal_arrays(90, head_dim=72)
    q[..., -1], k[..., -1] = 1, 0
    k[..., 1::2, -1] = constant
    dataset = write_dataset(tmp_path / "dataset.zarr", (q, k, v), 20)
    carry_out(plan_for(dataset, causal=True, chunks=7), dataset, tmp_path / "result.zarr")
    certificate = oocattn.verify(tmp_path / "result.zarr", rows=180)
    assert (certificate.passed, certificate.showing_nothing) == (True, [])
    assert certificate.worst_error < 2e-6


@pytest.mark.parametrize("size", [1e8, 3e9, 1e10, 1e20])
def test_large_scores_are_no_wrong_rows_and_no_nan(tmp_path: Path, size: float) -> None:
    """With a NaN in a value, which the reference computes."""
    q, k, v = normal_arrays(90, head_dim=64)
    q, k = q * np.float32(size**0.5), k * np.float32(size**0.5)
    v[0, 0, 80, 0] = np.nan
    dataset = write_dataset(tmp_path / "dataset.zarr", (q, k, v), 20)
    report = carry_out(plan_for(dataset, causal=True, chunks=7), dataset, tmp_path / "result.zarr").report
    assert report.out_not_finite == 20  # rows 80 to 89 of two heads attend it
    certificate = oocattn.verify(tmp_path / "result.zarr", rows=180)
    assert not certificate.failed
    assert certificate.worst_error < 1e-3  # of float64, unless two scores are nearly equal


def test_verify_warns_of_nothing_whatever_the_numbers(tmp_path: Path) -> None:
    arrays = tuple(array * np.float32(10) ** (5 * np.arange(8, dtype="f4") - 10) for array in normal_arrays(90))
    arrays[1][0, 0, 40] = -np.inf
    arrays[2][0, 0, 50, :3] = np.nan, np.inf, -np.inf
    dataset = write_dataset(tmp_path / "dataset.zarr", arrays)
    carry_out(plan_for(dataset, causal=True), dataset, tmp_path / "result.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not oocattn.verify(tmp_path / "result.zarr", rows=180).wrong


def test_no_rows_prove_nothing(result: Path) -> None:
    with pytest.raises(ProblemError, match=r"rows = 0 \(int\): expected a whole number of at least 1"):
        oocattn.verify(result, rows=0)


def test_a_dataset_is_no_finished_result(finished: Path) -> None:
    assert oocattn.status(finished / "dataset.zarr").state == "none"
