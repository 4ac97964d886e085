"""Runs whose arguments are arrays, or whose dataset has a key bias: the result keeps what resume and verify need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from reference import attention_by_definition
from support import assert_exact, assert_same_bits, normal_arrays, sizes_of, write_dataset

import oocattn
from oocattn import IntegrityError, ProblemError, ResultExistsError
from oocattn.cli.main import main
from oocattn.problem import given
from oocattn.problem.given import digest_of
from oocattn.storage.paths import ResultPaths

TOKENS, HEADS = 150, 4
ARRAYS = normal_arrays(TOKENS, heads=HEADS, kv_heads=2)
EDGES = [0, 40, 40, 130, TOKENS]
SLOPES = [0.5, 0.25, 0.125, 0.0625]
BIAS = np.random.default_rng(3).standard_normal((1, 1, TOKENS)).astype(np.float32)


@pytest.fixture(autouse=True)
def _beside_a_dataset(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fast_path)
    write_dataset(fast_path / "d.zarr", ARRAYS, chunk_rows=32)


def add_bias(bias: np.ndarray = BIAS) -> None:
    zarr.open_group("d.zarr").create_array("key_bias", data=bias, chunks=(1, 1, 64), overwrite=True)


def run(result: str = "out.zarr", **asked: Any) -> oocattn.Result:
    return oocattn.attention("d.zarr", result, **{"chunks": 7, "decomposition": "cqs", "engine": "inline", **asked})


def begin(**asked: Any) -> Path:
    """Begin a run and interrupt it; where its result grows."""
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[_stop], **asked)
    growing = ResultPaths.at("out.zarr").unfinished
    assert growing is not None
    return growing


def _stop(event: oocattn.Event) -> None:
    if isinstance(event, oocattn.Written):
        raise KeyboardInterrupt


def save(name: str, numbers: Any) -> str:
    np.save(f"{name}.npy", np.array(numbers))
    return f"{name}.npy"


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "documents": lambda: {"cu_seqlens_q": save("edges", EDGES), "causal": True},
    "terms": lambda: {"alibi_slopes": save("slopes", SLOPES), "learnable_sink": save("sinks", SLOPES), "softcap": 5.0},
    "used keys": lambda: {"seqused_k": save("used", [70]), "queries": (20, 120), "heads": [0, 3]},
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_run_is_resumed_and_verified_without_the_files_that_it_was_given(case: str) -> None:
    asked = GIVEN[case]()
    right = run("right.zarr", **asked)
    begin(**asked)
    for file in Path().glob("*.npy"):
        file.unlink()
    found = oocattn.resume("out.zarr", engine="inline")
    assert_same_bits(found, right)
    assert oocattn.verify("out.zarr").passed
    kept = {name: value for name, value in asked.items() if isinstance(value, str)}
    assert {name for name, _ in zarr.open_group("out.zarr").arrays()} == {"out", "lse", *kept}
    assert sizes_of(Path("out.zarr"))["asked_query_head" if "heads" in asked else "query_head"] == found.out.shape[1]


def test_a_part_of_the_rows_is_what_it_is_in_the_whole() -> None:
    asked = {"causal": True, "cu_seqlens_q": EDGES, "alibi_slopes": SLOPES, "window_size": (30, 0), "sink_tokens": 2}
    add_bias()
    part = run(queries=(35, 120), heads=[1, 2], **asked)
    assert (part.out.shape, part.lse.shape) == ((1, 2, 85, 8), (1, 2, 85))
    out, lse = attention_by_definition(*ARRAYS, key_bias=BIAS, **asked)
    assert_exact(np.asarray(part.out[...]), out[:, 1:3, 35:120], "float32", 4.0)
    np.testing.assert_allclose(part.lse[...], lse[:, 1:3, 35:120], rtol=1e-5, atol=1e-5)
    assert oocattn.verify("out.zarr").passed


def test_a_finished_result_is_of_these_numbers_alone() -> None:
    first = run(cu_seqlens_q=EDGES)
    assert run(cu_seqlens_q=np.array(EDGES, np.int32)).path == first.path
    for other in ({"cu_seqlens_q": [0, 41, 41, 130, TOKENS]}, {}, {"cu_seqlens_q": EDGES, "learnable_sink": SLOPES}):
        with pytest.raises(ResultExistsError, match=r"its problem differs: other (cu_seqlens_q|learnable_sink).*overwrite"):
            run(**other)


def test_an_array_is_digested_as_it_is_given_and_as_it_is_read_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[int] = []
    monkeypatch.setattr(given, "digest_of", lambda array: digest_of(array) if digested.append(len(array)) is None else "")
    run(cu_seqlens_q=EDGES)  # the report at its end reads them, as it does all of the result's record
    assert digested == [len(EDGES)] * 2
    run(cu_seqlens_q=EDGES)  # the finished result is returned
    assert digested == [len(EDGES)] * 3
    oocattn.verify("out.zarr")  # reads them first, at the end, in case that they have changed, and for the report
    assert digested == [len(EDGES)] * 7


def test_an_unfinished_run_is_of_these_numbers_alone() -> None:
    begin(learnable_sink=SLOPES)
    with pytest.raises(ResultExistsError, match=r"an unfinished run of another problem \(other learnable_sink"):
        run(learnable_sink=[*SLOPES[1:], 0.0])


@pytest.mark.parametrize("damage", ["removed", "other numbers"])
def test_a_damaged_array_of_an_unfinished_run_is_refused_until_it_is_begun_again(
    damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    growing = begin(cu_seqlens_q=EDGES)
    if damage == "removed":
        shutil.rmtree(growing / "cu_seqlens_q")
    else:
        (growing / "cu_seqlens_q/c.0").write_bytes(np.array([0, 41, 41, 130, TOKENS]).tobytes())
    for again in (lambda: oocattn.resume("out.zarr", engine="inline"), lambda: run(cu_seqlens_q=EDGES)):
        with pytest.raises(IntegrityError, match=r"cu_seqlens_q.*: .*overwrite=True"):
            again()
    assert main(["status", "out.zarr"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert oocattn.verify(run(cu_seqlens_q=EDGES, overwrite=True).path).passed


def test_a_damaged_array_of_a_finished_result_is_told_by_verify() -> None:
    run(cu_seqlens_q=EDGES)
    Path("out.zarr/cu_seqlens_q/c.0").write_bytes(bytes(40))
    with pytest.raises(IntegrityError, match="cu_seqlens_q is not what the run was given"):
        oocattn.verify("out.zarr")
    assert oocattn.status("out.zarr").state == "finished"


def test_a_copy_of_a_result_by_plain_zarr_is_verified() -> None:
    run(cu_seqlens_q=EDGES, alibi_slopes=SLOPES)
    source, copy = zarr.open_group("out.zarr"), zarr.open_group("copy.zarr", mode="w")
    copy.attrs.update(source.attrs.asdict())
    for name, array in source.arrays():
        written = copy.create_array(name, data=array[...], config={"write_empty_chunks": True})  # compressed
        written.attrs.update(array.attrs.asdict())
    assert oocattn.verify("copy.zarr").passed


# The dataset's key bias


def test_a_bias_that_appears_or_goes_makes_another_problem() -> None:
    first = run()
    add_bias()
    with pytest.raises(ResultExistsError, match="bias heads 0, now 1"):
        run()
    assert run(key_bias=False).path == first.path
    certificate = oocattn.verify("out.zarr")
    assert certificate.passed
    assert certificate.dataset_found == certificate.dataset_recorded
    second = run("biased.zarr")
    shutil.rmtree("d.zarr/key_bias")
    with pytest.raises(ProblemError, match=r"poses another problem than the result's .*bias heads 1, now 0"):
        oocattn.verify(second.path)


def test_a_bias_that_changes_meanwhile_is_told_where_it_is_used() -> None:
    add_bias()
    begin(key_bias=False)
    add_bias(BIAS + 1)
    oocattn.resume("out.zarr", engine="inline")
    assert oocattn.verify("out.zarr").passed
    shutil.rmtree("out.zarr")
    begin()
    add_bias(BIAS)
    with pytest.raises(IntegrityError, match=r"key_bias of the dataset changed"):
        oocattn.resume("out.zarr", engine="inline")


def test_keys_of_minus_infinity_are_masked_and_nan_reaches_who_attends_it() -> None:
    bias = BIAS.copy()
    bias[..., 20:60], bias[..., 100] = -np.inf, np.nan
    add_bias(bias)
    found = np.asarray(run(causal=True).out[...])
    assert np.isfinite(found[:, :, :100]).all()
    assert np.isnan(found[:, :, 100:]).all()
    q, k, v = ARRAYS
    hidden = np.array(v)
    hidden[:, :, 20:60] = 1e30
    write_dataset(Path("e.zarr"), (q, k, hidden))
    zarr.open_group("e.zarr").create_array("key_bias", data=bias)
    other = oocattn.attention("e.zarr", "e-out.zarr", causal=True, engine="inline")
    np.testing.assert_allclose(other.out[:, :, :100], found[:, :, :100], rtol=1e-5, atol=1e-6)


def test_a_run_without_any_pair_gives_rows_of_zero_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seqused-k", "0", "--learnable-sink", "0.5,1,0,2", "--engine", "inline", "--progress"]
    assert main(["run", "d.zarr", "out.zarr", *options]) == 0
    assert main(["resume", "out.zarr"]) == main(["status", "out.zarr"]) == main(["verify", "out.zarr"]) == 0
    assert "600 rows attend no key" in capsys.readouterr().out
    found = zarr.open_group("out.zarr")
    assert not np.asarray(found["out"]).any()
    np.testing.assert_array_equal(found["lse"][0, :, 0], np.array([0.5, 1, 0, 2], np.float32))
