"""Whatever is wrong, the message names it and says what to do, and nothing has appeared under the result's name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from support import TOKENS, assert_nothing_written, carry_out, damage, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import BudgetError, Event, IntegrityError, LockedError, OocattnError, ProblemError, ResultExistsError
from oocattn.pipelines.engines.dask import cluster
from oocattn.storage.paths import ResultPaths


def replace_array(name: str, data: np.ndarray | None) -> Callable[[Path], None]:
    def change(dataset: Path) -> None:
        group = zarr.open_group(dataset, mode="r+")
        del group[name]
        if data is not None:
            group.create_array(name, shape=data.shape, dtype=data.dtype)[...] = data

    return change


def empty_array(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    def change(dataset: Path) -> None:
        zarr.open_group(dataset, mode="r+").create_array(name, shape=shape, dtype="float32", overwrite=True)

    return change


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


PROBLEMS = {
    "missing": (replace_array("v", None), {}, r"no array 'v' in .*: found \['k', 'q'\].*oocattn.import_arrays"),
    "rank": (replace_array("k", numbers(TOKENS, 8)), {}, r"array 'k' has shape \[64, 8\]: expected \[B, H, N, D\]"),
    "tokens": (
        replace_array("v", numbers(1, 1, 65, 8)),
        {},
        r"array 'v' has shape \[1, 1, 65, 8\]: expected \[1, 1, 64, 8\]",
    ),
    "batch": (
        replace_array("k", numbers(2, 1, 64, 8)),
        {},
        r"array 'k' has shape \[2, 1, 64, 8\]: expected \[1, 1, 64, 8\]",
    ),
    "head dim": (replace_array("k", numbers(1, 1, 64, 9)), {}, r"array 'k' .*\[1, 1, 64, 9\]: expected \[1, 1, 64, 8\]"),
    "heads": (replace_array("q", numbers(1, 3, 64, 8)), {}, None),  # 3 is a multiple of 1
    "dtype": (replace_array("q", numbers(1, 2, 64, 8, dtype="float64")), {}, "array 'q' has dtype float64: expected one of"),
    "integers": (replace_array("v", numbers(1, 1, 64, 8, dtype="int16")), {}, "array 'v' has dtype int16: expected one of"),
    "mixed": (replace_array("v", numbers(1, 1, 64, 8, dtype="float16")), {}, "'v' has dtype float16: expected float32"),
    "empty": (empty_array("q", (1, 2, 0, 8)), {}, "array 'q' is empty: every dimension must be at least 1"),
    "no group": (shutil.rmtree, {}, r"no Zarr group at .*dataset\.zarr"),
    "scale": (None, {"scale": -1.0}, r"scale = -1.0 \(float\): expected a positive finite number"),
    "output dtype": (None, {"dtype": "int8"}, r"dtype = 'int8' \(str\): expected one of float16, bfloat16, float32"),
    "chunks": (None, {"chunks": 65}, "chunks = 65: expected 1 to 64 for 64 keys"),
    "decomposition": (
        None,
        {"decomposition": "rings"},
        r"decomposition = 'rings' \(str\): expected one of auto, cqs, strips",
    ),
    "kernel": (None, {"kernel": "abacus"}, r"kernel = 'abacus' \(str\): expected one of cpu, reference"),
    "size": (None, {"host_memory": "lots"}, "host_memory 'lots' is not understood: write it as"),
    "no memory": (None, {"device_memory": 0}, "device_memory 0 must be a whole number of at least 1"),
}


@pytest.mark.parametrize(("change", "options", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_no_problem_is_refused(
    dataset: Path,
    result: Path,
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
    message: str | None,
) -> None:
    if change is not None:
        change(dataset)
    if message is None:
        assert oocattn.attention(dataset, result, engine="inline").out.shape == (1, 3, 64, 8)
        return
    with pytest.raises(ProblemError, match=message):
        oocattn.attention(dataset, result, engine="inline", **options)
    with pytest.raises(ProblemError, match=message):
        oocattn.plan(dataset, **options)
    assert_nothing_written(result)


def test_a_cluster_without_workers_is_refused(dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "FIRST_WORKER_SECONDS", 0.2)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as nobody,
        Client(nobody, set_as_default=False) as client,
        pytest.raises(ProblemError, match=r"0 workers after 0\.2 s: a run needs at least one; start workers"),
    ):
        oocattn.attention(dataset, result, client=client)
    with pytest.raises(ProblemError, match=r"lanes = 0 .*: expected a whole number of at least 1"):
        oocattn.plan(dataset, lanes=0)
    assert_nothing_written(result)


def test_query_heads_are_a_multiple_of_the_others(result: Path, fast_path: Path) -> None:
    q, _, _ = normal_arrays(9, heads=3)
    _, k, v = normal_arrays(9, kv_heads=2)
    dataset = write_dataset(fast_path / "dataset.zarr", (q, k, v))
    with pytest.raises(ProblemError, match="q has 3 heads and k has 2: the query heads must be a multiple"):
        oocattn.attention(dataset, result, engine="inline")
    assert_nothing_written(result)


@pytest.mark.parametrize("budget", ["host_memory", "device_memory"])
def test_a_small_budget_is_refused_with_one_that_works(client: Client, dataset: Path, result: Path, budget: str) -> None:
    with pytest.raises(BudgetError, match=f"{budget} 1 KiB is too small") as refused:
        oocattn.attention(dataset, result, client=client, **{budget: "1KiB"})
    assert_nothing_written(result)
    smallest = re.search(r"the smallest that works is (\w+)", str(refused.value))[1]
    assert oocattn.attention(dataset, result, client=client, **{budget: smallest}).path == result


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: None, "is missing.*copy it again"),
        (lambda data: data[:-1], "has 511 bytes, expected 512.*copy it again"),
        (lambda data: data + b"\0", "has 513 bytes, expected 512"),
        (lambda data: b"", "has 0 bytes, expected 512"),
    ],
    ids=["missing", "short", "long", "empty"],
)
def test_a_damaged_chunk_is_found_before_anything_is_written(
    dataset: Path, result: Path, name: str, content: Callable[[bytes], bytes | None], message: str
) -> None:
    damage(dataset / name / "c/0/0/2/0", content)
    with pytest.raises(IntegrityError, match=rf"array '{name}' of .*chunk 'c/0/0/2/0'.* {message}"):
        oocattn.attention(dataset, result, engine="inline")
    assert_nothing_written(result)
    assert not ResultPaths.at(result).state.exists()


def test_a_compressed_chunk_that_is_damaged_stops_the_run(fast_path: Path, result: Path) -> None:
    dataset = write_dataset(fast_path / "zstd.zarr", normal_arrays(TOKENS), 16, compressors=zarr.codecs.ZstdCodec())
    plan = plan_for(dataset, chunks=7)
    damage(dataset / "v/c/0/0/3/0", lambda data: data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=r"array 'v' of .*'c/0/0/3/0'.*cannot be decoded"):
        carry_out(plan, dataset, result)
    assert not os.path.lexists(result)
    assert "cannot be decoded" in oocattn.status(result).error


# Results that exist


def file_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_result_is_returned_as_it_is(dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    first = carry_out(plan, dataset, result)
    before = file_times(result)
    events: list[Event] = []
    another_plan = plan_for(dataset, chunks=3, causal=True)
    assert carry_out(another_plan, dataset, result, callbacks=[events.append]).report == first.report
    again = carry_out(plan, dataset, result, callbacks=[events.append])
    assert again.report == first.report
    assert events == []
    assert file_times(result) == before
    replaced = carry_out(plan, dataset, result, callbacks=[events.append], overwrite=True)
    assert events[-1].kind == "ended"
    assert replaced.report.finished >= first.report.finished


def test_a_kill_between_result_and_report_is_no_dead_end(dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=7)
    carry_out(plan, dataset, result)
    ResultPaths.at(result).report.unlink()
    assert carry_out(plan, dataset, result).report is None
    assert oocattn.status(result).state == "finished"
    assert oocattn.verify(result).passed


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"causal": True}, "causal False, now True"),
        ({"scale": 0.5}, r"scale 0\.3535\d*, now 0\.5"),
        ({"scale": 0.5, "out_dtype": "float16"}, r"out dtype float32, now float16; scale 0\.3535\d*, now 0\.5"),
    ],
)
def test_the_result_of_something_else_is_kept(dataset: Path, result: Path, options: dict[str, Any], differs: str) -> None:
    carry_out(plan_for(dataset), dataset, result)
    before = file_times(result)
    other = plan_for(dataset, **options)
    with pytest.raises(ResultExistsError, match=rf"{result} .*\(its problem differs: {differs}\).*overwrite"):
        carry_out(other, dataset, result)
    assert file_times(result) == before
    carry_out(other, dataset, result, overwrite=True)
    assert zarr.open_group(result, mode="r").attrs["oocattn"]["plan"]["digest"] == other.digest


def test_the_result_of_another_dataset_is_kept(dataset: Path, result: Path, fast_path: Path) -> None:
    carry_out(plan_for(dataset), dataset, result)
    other = write_dataset(fast_path / "other.zarr", normal_arrays(TOKENS, seed=1), chunk_rows=16)
    places = f"its dataset differs: {dataset}, now {other}; its dataset differs: q, k and v not the same in"
    with pytest.raises(ResultExistsError, match=places):
        carry_out(plan_for(other), other, result)
    os.utime(dataset / "k/c/0/0/0/0", ns=(1, 1))
    with pytest.raises(ResultExistsError, match=r"\(its dataset differs: k not the same in"):
        carry_out(plan_for(dataset), dataset, result)


@pytest.mark.parametrize("kind", ["folder", "file", "array"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_result_is_never_replaced(dataset: Path, result: Path, kind: str, overwrite: bool) -> None:
    if kind == "folder":
        result.mkdir()
        (result / "thesis.txt").write_text("years of work")
    elif kind == "file":
        result.write_text("years of work")
    else:
        zarr.open_array(result, mode="w", shape=3, dtype="i4")[:] = 7
    with pytest.raises(ResultExistsError, match=str(result)):
        oocattn.attention(dataset, result, engine="inline", overwrite=overwrite)
    assert os.path.lexists(result)
    if kind == "folder":
        assert (result / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["", "q", "..", "link"])
def test_the_dataset_is_never_replaced(dataset: Path, fast_path: Path, where: str, overwrite: bool) -> None:
    result = dataset / where
    if where == "link":
        result = fast_path / "link.zarr"
        result.symlink_to(dataset)
    with pytest.raises((ProblemError, ResultExistsError)):
        oocattn.attention(dataset, result, engine="inline", overwrite=overwrite)
    assert oocattn.plan(dataset).problem.keys == TOKENS


# Locks

HOLD = """
import sys, time
from pathlib import Path
from oocattn.storage.journal.lock import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_result_is_written_by_one_run_at_a_time(dataset: Path, result: Path) -> None:
    paths = ResultPaths.at(result)
    paths.state.mkdir()
    source = str(Path(oocattn.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.lock)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"{paths.state}: .*process {holder.pid} on host {os.uname().nodename}"):
            carry_out(plan_for(dataset), dataset, result)
        assert not os.path.lexists(result)
        assert paths.unfinished is None
        status = oocattn.status(result)
        assert (status.state, str(holder.pid) in status.holder) == ("running", True)
    finally:
        holder.kill()
        holder.wait()
    assert carry_out(plan_for(dataset), dataset, result).path == result  # the lock died with its process


def test_a_second_run_in_the_same_process_is_refused(dataset: Path, result: Path) -> None:
    refusals: list[LockedError] = []

    def run_again(event: Event) -> None:
        if event.kind == "started":
            with pytest.raises(LockedError, match=rf"process {os.getpid()} on host") as refused:
                carry_out(plan_for(dataset), dataset, result)
            refusals.append(refused.value)

    carry_out(plan_for(dataset), dataset, result, callbacks=[run_again])
    assert len(refusals) == 1
    assert not ResultPaths.at(result).lock.exists()


def test_every_error_has_one_base() -> None:
    for error in (BudgetError, IntegrityError, LockedError, ProblemError, ResultExistsError):
        assert issubclass(error, OocattnError)
    assert issubclass(ProblemError, ValueError)
    assert issubclass(ResultExistsError, FileExistsError)
