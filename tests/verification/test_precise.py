"""Precise runs: whole ones on a CPU, and certificates that tell them from those of kernels that round weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from reference import attention64, relative_error
from second_passes import attend32
from support import MACHINE, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Certificate, ProblemError
from oocattn.cli.main import main

DTYPES = ("float16", "bfloat16")


def write(folder: Path, dtype: str) -> Path:
    """A dataset."""
    return write_dataset(folder / "half.zarr", normal_arrays(300, head_dim=32, dtype=dtype), 50)


def put_rounded(result: Path, dtype: str, out_dtype: str = "float32") -> None:
    """Replace a result by that of weights that are rounded to the dtype of the inputs."""
    found = attend32(normal_arrays(300, head_dim=32, dtype=dtype), rounds_weights=True, causal=True)
    group = zarr.open_group(result, mode="r+")
    group["out"][...] = found.out.astype(out_dtype)
    group["lse"][...] = found.lse


def verify(result: Path) -> Certificate:
    return oocattn.verify(result, checksums=False, all_rows=True, engine="inline")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_precise_run_of_16_bit_inputs_has_float32_accuracy(fast_path: Path, dtype: str) -> None:
    dataset, arrays = write(fast_path, dtype), normal_arrays(300, head_dim=32, dtype=dtype)
    result = oocattn.attention(
        dataset, fast_path / "out.zarr", causal=True, dtype="float32", precise=True, engine="inline", kernel="cpu"
    )
    expected, lse = attention64(*arrays, True, 32**-0.5)
    assert result.out.dtype == np.float32
    assert relative_error(result.out[...], expected) < 1e-6
    np.testing.assert_allclose(result.lse[...], lse, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_certificate_of_a_precise_run_tells_rounded_weights(fast_path: Path, dtype: str) -> None:
    dataset, result = write(fast_path, dtype), fast_path / "out.zarr"
    oocattn.attention(dataset, result, causal=True, dtype="float32", precise=True, engine="inline", kernel="cpu")
    right = verify(result)
    assert right.passed
    assert right.all_rows is not None
    assert right.all_rows.suspected == 0
    assert max(row.allowed for row in right.rows) < 2e-5
    assert "kernel cpu rounds no softmax weights: precise" in str(right)
    assert "Kernel cpu rounds no softmax weights: precise." in (fast_path / "out.zarr.oocattn/certificate.html").read_text()
    put_rounded(result, dtype)
    wrong = verify(result)
    assert wrong.failed
    assert len(wrong.wrong) > len(wrong.rows) / 2
    assert wrong.all_rows is not None
    assert wrong.all_rows.wrong_rows > wrong.all_rows.rows / 2
    assert oocattn.status(result).certificate == "failed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_weights_are_right_where_the_kernel_rounds_them(fast_path: Path, dtype: str) -> None:
    dataset, result = write(fast_path, dtype), fast_path / "out.zarr"
    machine = replace(MACHINE, rounds_weights=True)
    carry_out(plan_for(dataset, causal=True, out_dtype="float32", machine=machine), dataset, result)
    put_rounded(result, dtype)
    found = verify(result)
    assert found.passed
    assert f"kernel cpu rounds softmax weights to {dtype}, and rows may be off by as much" in str(found)


def test_a_kernel_that_rounds_weights_is_refused_before_anything_is_written(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dataset, result = write(fast_path, "float16"), fast_path / "out.zarr"
    words = "kernel 'hopper' cannot attend float16 with D = 32 on cuda: it rounds softmax weights to float16, which "
    for engine in ("inline", "dask"):
        with pytest.raises(ProblemError, match=f"{words}precise rules out; leave kernel out"):
            oocattn.attention(dataset, result, kernel="hopper", precise=True, engine=engine)
    with pytest.raises(ProblemError, match=words):
        oocattn.plan(dataset, kernel="hopper", precise=True)
    assert main(["run", str(dataset), str(result), "--kernel", "hopper", "--precise"]) == 1
    assert f"{words}--precise rules out; leave --kernel out" in capsys.readouterr().err
    assert [path.name for path in fast_path.iterdir()] == ["half.zarr"]


def test_the_command_makes_a_precise_result_in_float32(fast_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, result = str(write(fast_path, "float16")), str(fast_path / "out.zarr")
    asked = ["--precise", "--dtype", "float32", "--causal", "--engine", "inline"]
    assert main(["plan", dataset, *asked, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["rounds_weights"] is False
    assert main(["run", dataset, result, *asked]) == 0
    recorded = zarr.open_group(result, mode="r").attrs["oocattn"]
    assert recorded["plan"]["rounds_weights"] is False
    assert recorded["problem"]["out_dtype"] == "float32"
    assert main(["verify", result]) == 0
    assert "rounds no softmax weights: precise" in capsys.readouterr().out
