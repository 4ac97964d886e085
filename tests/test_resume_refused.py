"""A run is not resumed for another problem, dataset, plan, version or arithmetic, and the error says why."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from interrupting import TOKENS, EnoughError, interrupt, interrupted, uninterrupted, write_resuming_dataset
from support import (
    MACHINE,
    a_problem,
    assert_same_bits,
    carry_out,
    normal_arrays,
    plan_for,
    write_dataset,
)

import oocattn
from oocattn import BudgetError, IntegrityError, ProblemError, ResultExistsError
from oocattn.kernels.arithmetic import arithmetic_of
from oocattn.pipelines.engines.inline import InlineEngine
from oocattn.pipelines.run import find_unfinished
from oocattn.pipelines.session import Resuming, resume_run
from oocattn.problem.given import DTYPES, GivenArrays
from oocattn.storage.files.durable import encode_record
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths
from oocattn.version import versions


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_resuming_dataset(fast_path)


def test_resume_is_refused_without_an_unfinished_run(dataset: Path, result: Path) -> None:
    with pytest.raises(ProblemError, match=r"result\.zarr: no run to resume; begin one"):
        oocattn.resume(result, engine="inline")
    done = carry_out(plan_for(dataset), dataset, result)
    assert oocattn.resume(result, engine="inline").path == done.path


def test_an_unfinished_run_of_another_problem_dataset_or_plan_is_not_touched(
    dataset: Path, result: Path, fast_path: Path
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    interrupted(plan, dataset, result)
    other = write_dataset(fast_path / "other.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, seed=1))
    refused: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (dataset, {}, ResultExistsError, r"unfinished run of another problem \(causal True, now False\)"),
        (other, {"causal": True}, ResultExistsError, rf"unfinished run of another dataset \({dataset}, now {other}\)"),
        (dataset, {"causal": True, "chunks": 5}, ResultExistsError, "has chunks 7, not 5"),
        (dataset, {"causal": True, "decomposition": "strips"}, ResultExistsError, "has decomposition cqs, not strips"),
        (dataset, {"causal": True, "kernel": "reference"}, ResultExistsError, "has kernel cpu, not reference"),
        (dataset, {"causal": True, "host_memory": 1000}, BudgetError, "takes .* of host memory, more than 1000 B"),
    ]
    for asked, options, error, message in refused:
        with pytest.raises(error, match=message):
            oocattn.attention(asked, result, engine="inline", **options)
    with pytest.raises(ResultExistsError, match=r"another plan \(query chunks 7, now 5; .*chunk rows 25, now 34; .*\)"):
        carry_out(plan_for(dataset, chunks=5, causal=True), dataset, result)
    assert oocattn.resume(result, engine="inline").report.pairs_before > 0


def test_a_run_that_rounds_weights_is_not_resumed_as_a_precise_one(result: Path, fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "half.zarr", normal_arrays(TOKENS, dtype="bfloat16"), 16)
    interrupted(plan_for(dataset, chunks=7, machine=replace(MACHINE, rounds_weights=True)), dataset, result)
    words = r"is of kernel cpu, which rounds softmax weights to bfloat16, and not precise: resume it without precise"
    with pytest.raises(ResultExistsError, match=rf"unfinished run in .* {words}, or begin again with overwrite=True"):
        oocattn.attention(dataset, result, engine="inline", precise=True)
    assert oocattn.attention(dataset, result, engine="inline").report.pairs_before > 0
    words = r"is of kernel cpu, which rounds softmax weights to bfloat16, and not precise: ask for it without precise"
    with pytest.raises(ResultExistsError, match=rf"{result} exists and {words}"):
        oocattn.attention(dataset, result, engine="inline", precise=True)
    again = oocattn.attention(dataset, result, engine="inline", precise=True, overwrite=True)
    assert oocattn.attention(dataset, result, engine="inline", precise=True).report == again.report


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_run_that_rounds_no_weights_is_resumed_as_a_precise_one(result: Path, fast_path: Path, dtype: str) -> None:
    dataset = write_dataset(fast_path / "any.zarr", normal_arrays(TOKENS, dtype=dtype), 16)
    machine = replace(MACHINE, rounds_weights=dtype == "float32")  # to float32, which is precise
    interrupted(plan_for(dataset, chunks=7, machine=machine), dataset, result)
    report = oocattn.attention(dataset, result, engine="inline", precise=True).report
    assert report.pairs_before > 0
    assert oocattn.attention(dataset, result, engine="inline", precise=True).report == report


def test_another_run_than_was_asked_for_is_not_resumed(dataset: Path, result: Path) -> None:
    """It has begun in the seconds in which a cluster starts."""
    plan, causal = plan_for(dataset, chunks=7), plan_for(dataset, chunks=7, causal=True)
    interrupted(plan, dataset, result)
    paths = ResultPaths.at(result)
    asked = find_unfinished(paths)
    with pytest.raises(EnoughError):
        carry_out(causal, dataset, result, callbacks=[interrupt("written", 5)], overwrite=True)
    with pytest.raises(ResultExistsError, match=r"than when the command began \(causal False, now True\): resume again"):
        resume_run(asked, Dataset.open(dataset), InlineEngine(1), (), math.inf, Resuming())
    assert_same_bits(oocattn.resume(result, engine="inline"), uninterrupted(causal, dataset))


def test_a_run_is_not_resumed_where_its_dataset_changed(dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=7)
    interrupted(plan, dataset, result)
    for name in "kv":
        os.utime(dataset / name / "c/0/0/0/0", ns=(1, 1))
    for again in (
        lambda: oocattn.resume(result, engine="inline"),
        lambda: carry_out(plan, dataset, result),
    ):
        with pytest.raises(IntegrityError, match=r"zarr: k and v of the dataset changed .* since the run in .* began"):
            again()
    assert carry_out(plan, dataset, result, overwrite=True).report.pairs_before == 0


def test_a_chunk_that_was_written_is_noticed_though_size_and_time_are_set_back(
    dataset: Path,
    result: Path,
) -> None:
    """A copy, or files that were only touched, are named by who knows that they are the same."""
    plan = plan_for(dataset, chunks=7)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result)
    chunk = dataset / "k/c/0/0/0/0"
    status = chunk.stat()
    chunk.write_bytes(chunk.read_bytes())
    os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))
    for again in (
        lambda: oocattn.resume(result, engine="inline"),
        lambda: carry_out(plan, dataset, result),
    ):
        with pytest.raises(IntegrityError, match=r"zarr: files of k of the dataset were replaced or written .* of `resume`"):
            again()
    assert_same_bits(oocattn.resume(result, engine="inline", inputs=dataset), right)


def test_a_run_that_another_version_began_is_not_resumed(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plan_for(dataset, chunks=7), dataset, result)
    monkeypatch.setattr("oocattn.pipelines.existing.versions", lambda: {"oocattn": "99"})
    with pytest.raises(ResultExistsError, match=r"unfinished run of another oocattn \(0\.1\.0, now 99\)"):
        oocattn.resume(result, engine="inline")


def other_arithmetic(*arguments: Any) -> dict[str, str]:
    """What a worker with another torch, on another processor, says of itself."""
    return {**arithmetic_of(*arguments), "torch": "99", "cpu": "AVX99"}


def test_other_bits_are_refused_or_accepted_and_reported(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=7)
    interrupted(plan, dataset, result, client=client)
    words = rf"was begun with torch {re.escape(versions()['torch'])}, now 99; cpu .*, now AVX99: .*accept_other_bits=True"
    with monkeypatch.context() as patched:
        patched.setattr("oocattn.pipelines.engines.dask.readiness.arithmetic_of", other_arithmetic)
        for again in (
            lambda: oocattn.resume(result, client=client),
            lambda: carry_out(plan, dataset, result, client),
        ):
            with pytest.raises(ResultExistsError, match=words):
                again()
        with pytest.raises(EnoughError):
            oocattn.resume(result, client=client, accept_other_bits=True, callbacks=[interrupt("attended", 1)])
    report = oocattn.resume(result, client=client).report
    assert "now 99" in report.other_bits
    assert "other bits" in str(report)
    assert carry_out(plan, dataset, result, client, overwrite=True).report.other_bits == ""


def test_arithmetic_differs_where_torch_takes_other_vector_instructions() -> None:
    """The bits of a small call differ where torch takes other vector instructions, and not with the number of threads."""
    script = (
        "from support import a_problem; from oocattn.kernels.arithmetic import arithmetic_of; "
        "print(arithmetic_of('cpu', a_problem(9, dtype='float32'), 'cpu'))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    before, here = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            here.append(f"{arithmetic_of('cpu', a_problem(9, dtype='float32'), 'cpu')}\n")
    finally:
        torch.set_num_threads(before)
    assert here[0] == here[1]
    assert here[0] != ended.stdout


def arithmetic(**options: Any) -> dict[str, str]:
    """The arithmetic of this process on a problem of many rows."""
    given = GivenArrays(**{name: options.pop(name) for name in DTYPES if name in options})
    problem = a_problem(3000, **{"batch": 3, "query_heads": 4, "causal": False, "head_dim": 64, **options}, given=given)
    return arithmetic_of("cpu", problem, "cpu")


ASKED: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (2000, None)},
    {"causal": True, "window_size": (20, None)},
    {"window_size": (20, 10)},
    {"causal": True, "window_size": (20, None), "sink_tokens": 4},
    {"causal": True, "prefix": 500},
    {"cu_seqlens_q": np.array([0, 7, 3000])},
    {"seqused_k": np.array([5, 0, 3000])},
    {"softcap": 5.0},
    {"alibi_slopes": np.full((3, 4), 0.1, np.float32)},
    {"bias_heads": 4},
    {"learnable_sink": np.zeros(4, np.float32)},
    {"scale": 0.3},
    {"value_dim": 40},
    {"kv_heads": 4},
    {"dtype": "float32"},
]


def test_arithmetic_is_that_of_the_mask_and_of_every_term() -> None:
    """A kernel that computes one of them with other bits is noticed: the call that is made has it."""
    digests = [arithmetic(**asked)["arithmetic"] for asked in ASKED]
    assert {digest: digests.index(digest) for digest in digests} == {digest: at for at, digest in enumerate(digests)}
    assert arithmetic(queries=900, keys=1000, batch=1, causal=True)["arithmetic"] == digests[1]  # sizes are not in it


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {**header, "format": 99},
        lambda header: {**header, "plan": {**header["plan"], "chunks": 5}},
        lambda header: {**header, "plan": {**header["plan"], "chunk_rows": 1}},
        lambda header: {name: header[name] for name in ("format", "plan")},
        lambda header: {**header, "plan": {}},
        lambda header: {**header, "plan": {**header["plan"], "surprise": 1}},
    ],
)
def test_a_journal_that_cannot_be_ours_is_refused(
    dataset: Path, result: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    plan = plan_for(dataset, chunks=7)
    interrupted(plan, dataset, result)
    path = ResultPaths.at(result).state / "plan.json"
    header = json.loads(path.read_bytes().partition(b" ")[2])
    path.write_bytes(encode_record(change(header)))
    with pytest.raises(IntegrityError, match=r"not the journal of a run that can be resumed .*: begin again"):
        oocattn.resume(result, engine="inline")
    assert carry_out(plan, dataset, result, overwrite=True).path == result
