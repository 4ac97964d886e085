"""Rows are sampled in a process beside a second pass: the same certificate, whatever becomes of that process."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import called
import numpy as np
import pytest
import warm
import zarr
from called import serving, wait_until
from interrupting import EnoughError, interrupt
from support import normal_arrays, write_dataset

import oocattn
from oocattn import Certificate, Event, Started
from oocattn.afterwards import is_worth_a_process
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.verification import certify as certifying
from oocattn.verification.beside import PROCESS_BYTES, PROCESS_SECONDS, ProcessBeside
from oocattn.verification.certify import Examination

TOKENS = 300


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    arrays = normal_arrays(TOKENS, heads=4, kv_heads=2, head_dim=16, dtype="float16")
    bias = np.random.default_rng(1).standard_normal((1, 4, TOKENS)).astype(np.float32)
    return write_dataset(shared_path / "dataset.zarr", arrays, key_bias=bias)


@pytest.fixture
def result(dataset: Path, fast_path: Path) -> Path:
    oocattn.attention(dataset, fast_path / "result.zarr", chunks=7, engine="inline", cu_seqlens_q=[0, 90, 300], causal=True)
    return fast_path / "result.zarr"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if GPUs computed second passes, for long enough."""
    monkeypatch.setattr("oocattn.afterwards.is_worth_a_process", lambda started: True)


@pytest.fixture
def examined_here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was examined by this process."""
    found, examine = [], certifying._Result.examine

    def note(self: Any, *arguments: Any) -> Certificate:
        found.append(self)
        return examine(self, *arguments)

    monkeypatch.setattr(certifying._Result, "examine", note)
    return found


def verify(result: Any, *callbacks: Callable[[Event], None], **options: Any) -> Certificate:
    usual: dict[str, Any] = {"rows": 12, "all_rows": True, "engine": "inline", "callbacks": list(callbacks)}
    return oocattn.verify(result, **{**usual, **options})


def content(certificate: Certificate) -> dict[str, Any]:
    return replace(certificate, made="", files=()).to_json()


def damage(result: Path) -> None:
    """One part that is not as it was written, and one wrong row."""
    group = zarr.open_group(result, mode="r+")
    group["out"][0, 1, 40:50] = np.float16(0.5)  # type: ignore[index]
    group["lse"][0, 2, 77] = np.nan  # type: ignore[index]


@pytest.mark.parametrize("spoil", [lambda result: None, damage], ids=["right", "damaged"])
@pytest.mark.usefixtures("asked")
def test_a_process_finds_what_is_found_without_it(
    result: Path, spoil: Callable[[Path], None], examined_here: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(result)
    found = verify(result)
    assert not examined_here
    with monkeypatch.context() as patch:
        patch.setattr("oocattn.afterwards.is_worth_a_process", is_worth_a_process)
        alone = verify(result)
    assert len(examined_here) == 1
    assert content(found) == content(alone)
    assert found.failed == (spoil is damage)
    assert not serving()


def test_a_process_is_begun_where_gpus_work_for_longer_than_it_takes_to_come_up() -> None:
    of_calls: Any = {"heads": 8, "head_dim": 64, "dtype": "float16", "causal": True}

    def started(tokens: str, device: str, left: float = 1.0) -> Started:
        plan = oocattn.plan_ahead(tokens=tokens, device=device, **of_calls)
        pairs = int(left * plan.problem.pairs)
        return Started(start=0.0, stop=0.0, plan=plan, dashboard="", left=1, resumed=False, recomputed=0, pairs_left=pairs)

    long, short = started("2M", "h200"), started("64K", "h200")
    assert short.plan.seconds < PROCESS_SECONDS < long.plan.seconds
    assert is_worth_a_process(long)
    assert not is_worth_a_process(short)
    assert not is_worth_a_process(started("2M", "h200", left=0.01))
    assert not is_worth_a_process(started("2M", "cpu"))


def test_a_process_imports_no_pytorch_and_takes_little_memory(result: Path, dataset: Path) -> None:
    numbers: Any = {"rows": 8, "seed": 0, "checksums": True, "host_memory": 64 << 20}
    examination = Examination(ResultPaths.at(result), ResultArrays.open(result), Dataset.open(dataset), **numbers)
    with ProcessBeside[called.Found]() as process:
        process.begin(partial(called.examine, examination), 0)
        found = process.answer()
    assert found is not None
    assert found.examined is not None
    assert found.examined.certificate.passed
    assert not found.modules & {"torch", "dask", "distributed"}
    assert found.memory < PROCESS_BYTES


@pytest.mark.usefixtures("asked")
def test_a_process_that_is_killed_is_told_and_its_work_done(
    result: Path, examined_here: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def kill(event: Event) -> None:
        if event.kind == "written":
            for process in serving():
                process.kill()

    assert verify(result, kill).passed
    assert len(examined_here) == 1
    assert "a process was killed (signal 9): what it had begun is done here" in caplog.text


@pytest.mark.usefixtures("asked")
def test_no_process_is_left_where_the_pass_is_cut_off(result: Path) -> None:
    seen = []

    def note(event: Event) -> None:
        seen.extend(serving())

    with pytest.raises(EnoughError):
        verify(result, note, interrupt("attended", 2))
    assert seen
    assert not serving()


@pytest.mark.usefixtures("asked")
def test_arrays_in_memory_are_examined_by_this_process(
    fast_path: Path, examined_here: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(ProcessBeside, "begin", lambda *arguments: begun.append(arguments))
    inputs = dict(zip("qkv", normal_arrays(100), strict=True))
    oocattn.attention(inputs, fast_path / "result.zarr", engine="inline")
    assert verify(fast_path / "result.zarr", inputs=inputs).passed
    assert (begun, len(examined_here)) == ([], 1)


@pytest.mark.usefixtures("asked")
def test_a_dataset_that_only_this_process_finds_is_examined_by_it(result: Path, examined_here: list[Any]) -> None:
    oocattn.synthesise("memory://beside/dataset.zarr", tokens=100, heads=2, head_dim=8, dtype="float32")
    oocattn.attention("memory://beside/dataset.zarr", result, engine="inline", overwrite=True)
    assert verify(result, inputs="memory://beside/dataset.zarr").passed
    assert len(examined_here) == 1


@pytest.mark.usefixtures("asked")
def test_a_result_and_its_dataset_in_a_bucket_are_examined_by_a_process(
    s3: dict[str, Any], fast_path: Path, examined_here: list[Any]
) -> None:
    places: Any = {"storage_options": s3, "scratch": fast_path / "scratch"}
    oocattn.import_arrays("s3://bucket/beside.zarr", **dict(zip("qkv", normal_arrays(100), strict=True)), storage_options=s3)
    oocattn.attention("s3://bucket/beside.zarr", "s3://bucket/beside-out.zarr", engine="inline", **places)
    assert verify("s3://bucket/beside-out.zarr", inputs="s3://bucket/beside.zarr", **places).passed
    assert not examined_here


@pytest.mark.usefixtures("asked")
def test_what_was_examined_before_a_dataset_changed_is_examined_again(
    dataset: Path, fast_path: Path, examined_here: list[Any]
) -> None:
    copied, result = Path(shutil.copytree(dataset, fast_path / "dataset.zarr")), fast_path / "result.zarr"
    oocattn.attention(copied, result, engine="inline")

    def touch(event: Event) -> None:
        if event.kind == "ended":
            while serving():
                time.sleep(0.01)
            for path in copied.rglob("*"):
                os.utime(path)

    certificate = verify(result, touch)
    assert certificate.passed
    assert not certificate.dataset_unchanged
    assert len(examined_here) == 1


@pytest.fixture(scope="module")
def longer(shared_path: Path) -> tuple[Path, Certificate, int]:
    """A result with more keys than a tile has, its certificate, and what its pass and a process take of the budget."""
    plans = []
    dataset = write_dataset(shared_path / "longer.zarr", normal_arrays(8300, heads=1, head_dim=16, dtype="float16"))
    oocattn.attention(dataset, shared_path / "longer-out.zarr", engine="inline")
    found = verify(shared_path / "longer-out.zarr", lambda event: plans.extend([event.plan] if is_started(event) else []))
    return shared_path / "longer-out.zarr", found, plans[0].peak_host + PROCESS_BYTES


def is_started(event: Event) -> TypeGuard[Started]:
    return isinstance(event, Started)


@pytest.mark.parametrize(
    ("left", "begun", "here"),
    [(0, 0, 1), (1, 1, 1), (14, 1, 1), (64, 1, 0)],
    ids=["none for a process", "little for any tile", "some for small tiles", "enough"],
)
@pytest.mark.usefixtures("asked")
def test_a_process_keeps_within_what_the_pass_leaves_and_finds_the_same(
    longer: tuple[Path, Certificate, int],
    examined_here: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    left: int,
    begun: int,
    here: int,
) -> None:
    result, usual, taken = longer
    given, begin = [], ProcessBeside.begin

    def note(self: Any, call: Any, nbytes: int) -> None:
        given.append(nbytes)
        begin(self, call, nbytes)

    monkeypatch.setattr(ProcessBeside, "begin", note)
    assert content(verify(result, host_memory=taken + (left << 21))) == content(usual)
    assert given == [left << 20] * begun
    assert len(examined_here) == here


@pytest.mark.parametrize(("left", "order"), [(64, ["waited", "compared"]), (8192, ["compared", "waited"])])
@pytest.mark.usefixtures("asked")
def test_all_rows_are_compared_beside_the_process_where_the_budget_has_room(
    longer: tuple[Path, Certificate, int], monkeypatch: pytest.MonkeyPatch, left: int, order: list[str]
) -> None:
    result, usual, taken = longer
    found, compare, answer = [], certifying.check_all_rows, ProcessBeside.answer

    def note_compared(*arguments: Any) -> Any:
        found.append("compared")
        return compare(*arguments)

    def note_waited(self: Any) -> Any:
        found.append("waited")
        return answer(self)

    monkeypatch.setattr(certifying, "check_all_rows", note_compared)
    monkeypatch.setattr(ProcessBeside, "answer", note_waited)
    monkeypatch.setattr("oocattn.verification.budget.count_cores", lambda: 16)
    assert content(verify(result, host_memory=taken + (left << 21))) == content(usual)
    assert found == order


@pytest.mark.parametrize("stopped", [False, True], ids=["in the pass", "after it"])
def test_ctrl_c_ends_the_process_as_well(result: Path, stopped: bool) -> None:
    script = """
import os, sys, time
os.setsid()
from oocattn import afterwards
from oocattn.__main__ import run
from oocattn.pipelines.lane.cpu import CpuDevice
launch, pause = CpuDevice.launch, float(sys.argv.pop())
CpuDevice.launch = lambda *given: (time.sleep(pause), launch(*given))[1]
afterwards.is_worth_a_process = lambda started: True
sys.exit(run())
"""
    arguments = ["verify", str(result), "--all-rows", "--engine", "inline", "--no-progress"]
    process = warm.script(script, *arguments, "0" if stopped else "0.3")
    while not (found := serving(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    if stopped:
        found[0].suspend()
        wait_until(lambda: "predicted" in os.read(process.stdout.fileno(), 1 << 16).decode())
        time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("oocattn: interrupted")
    assert "Traceback" not in out + err
    wait_until(lambda: not found[0].is_running())
