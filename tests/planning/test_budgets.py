"""Overhead is priced, and the user hears what other budgets would give."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import MIB, plan, smallest_named
from support import GPU, MACHINE, a_problem, normal_arrays, replanned, write_dataset

import oocattn
from oocattn import BudgetError
from oocattn.planning import measure
from oocattn.planning.budgets import is_crowded, is_hopeless
from oocattn.planning.candidates import overhead_warning
from oocattn.planning.host import file_seconds
from oocattn.planning.machine import FILE_SECONDS, TASK_SECONDS
from oocattn.planning.options import CHECKPOINT_SECONDS
from oocattn.units import format_seconds

MANY_FILES = a_problem(4096, query_heads=16, kv_heads=16, head_dim=64)


def test_each_partial_in_a_file_is_priced_as_a_file() -> None:
    free_tasks = replace(MACHINE, task_seconds=0.0)
    on_disk = replanned(plan(MANY_FILES, free_tasks, chunks=651, decomposition="cqs"), partials="disk", accumulators=2)
    assert on_disk.chunk_rows == 7
    files = on_disk.link("files")
    division = on_disk.division_of(0)
    partials = 16 * sum(len(division.contributors(chunk)) for chunk in range(586))  # the others have no rows
    assert partials > 16 * 586 * 20
    assert files.amount == partials + 16 * 586 * 3 + 9  # with out, lse and journal of each chunk; those of any run
    assert files.seconds > partials * FILE_SECONDS
    assert on_disk.binds == "files"
    assert on_disk.seconds > partials * FILE_SECONDS + on_disk.link("compute").seconds  # one thread does both
    assert re.search(r"^files +262 k +570  <- binds$", str(on_disk), re.MULTILINE)


def test_files_of_checkpoints_are_priced() -> None:
    slow = replace(MACHINE, kernel_flops=1e9)
    saved, unsaved = (plan(a_problem(65536), slow, chunks=7, checkpoint_seconds=seconds) for seconds in (60.0, 0.0))
    saves = saved.link("compute").seconds // 30
    assert saves > 10
    assert saved.link("files").amount == unsaved.link("files").amount + saves * saved.accumulators


def test_a_slow_file_system_makes_a_plan_slower() -> None:
    slow = replace(MACHINE, file_seconds=1.0)
    fast, slower = (plan(a_problem(1000), machine, chunks=7) for machine in (MACHINE, slow))
    assert slower.seconds > 24 > 10 * fast.seconds


def test_tasks_slow_computing_on_a_cpu_only() -> None:
    problem, options = a_problem(1 << 17), {"chunks": 31, "decomposition": "cqs"}
    for machine, serial in ((MACHINE, True), (replace(GPU, kernel_flops=1e11), False)):
        free = plan(problem, replace(machine, task_seconds=0.0), **options)
        made = plan(problem, replace(machine, task_seconds=0.1), **options)
        tasks = made.link("tasks").seconds - free.link("tasks").seconds
        assert tasks == pytest.approx(12.4)
        assert made.seconds - free.seconds == pytest.approx(0.4 + (tasks / 2 if serial else 0.0))


def test_small_calls_of_a_cpu_kernel_are_priced() -> None:
    coarse, fine = (plan(a_problem(4096), chunks=chunks, decomposition="cqs").link("compute") for chunks in (1, 307))
    assert fine.amount == coarse.amount
    assert fine.seconds > coarse.seconds + 5000 * 0.0002


@pytest.mark.parametrize("machine", [MACHINE, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["host_memory", "device_memory"])
def test_a_refusal_says_how_long_the_smallest_and_larger_budgets_take(machine: Any, name: str) -> None:
    problem = a_problem(1 << 20, query_heads=8, kv_heads=2)
    with pytest.raises(BudgetError) as refused:
        plan(problem, machine, **{name: 1})
    text = str(refused.value)
    named = re.findall(r"(\d+)MiB \(([^)]*)\)", text)
    assert len(named) == (3 if name == "host_memory" and machine is GPU else len(named))
    assert f"the smallest that works is {named[0][0]}MiB (" in text
    for budget, seconds in named:
        made = plan(problem, machine, **{name: int(budget) * MIB})
        assert format_seconds(made.seconds) == seconds
        assert not is_hopeless(made)


def test_a_hopeless_budget_is_refused_with_one_that_is_not() -> None:
    problem = a_problem(1 << 20, query_heads=32, kv_heads=8, head_dim=128, causal=False)
    expected = r"host_memory 60 MiB would take \d+ min, nearly all of it for tasks and files"
    with pytest.raises(BudgetError, match=expected) as refused:
        plan(problem, GPU, host_memory=60 * MIB)
    name, smallest = smallest_named(refused.value)
    assert name == "host_memory"
    assert not is_hopeless(plan(problem, GPU, host_memory=smallest))
    with pytest.raises(BudgetError):
        plan(problem, GPU, host_memory=smallest - MIB)


def test_a_hopeless_plan_is_made_where_no_budget_has_a_better_one() -> None:
    pinned = plan(MANY_FILES, chunks=651, decomposition="cqs", checkpoint_seconds=0.0)
    assert not is_hopeless(pinned)
    many_heads = plan(a_problem(64, batch=1000, query_heads=32, kv_heads=32, causal=False))
    assert is_hopeless(many_heads)
    assert many_heads.chunks == 1
    warning = overhead_warning(many_heads, MACHINE)
    assert warning is not None
    assert warning.endswith(": no larger budget is much faster")


def test_a_plan_of_mostly_tasks_is_said_with_a_budget_that_is_better() -> None:
    problem = a_problem(16384, query_heads=8, kv_heads=2)
    made = plan(problem, host_memory=10 * MIB)
    assert is_crowded(made)
    warning = overhead_warning(made, MACHINE)
    assert warning is not None
    assert f"{made.link('tasks').amount:,.0f} tasks" in warning
    budget, seconds = re.search(r": host_memory='(\d+)MiB' takes ([^:]*) in all$", warning).groups()
    better = plan(problem, host_memory=int(budget) * MIB)
    assert better.seconds * 1.5 < made.seconds
    assert format_seconds(better.seconds) == seconds


def test_a_plan_of_mostly_computing_has_no_warning() -> None:
    for machine in (MACHINE, GPU):
        for tokens in (1000, 1 << 17, 1 << 22):
            assert overhead_warning(plan(a_problem(tokens), machine), machine) is None


def test_a_pinned_division_of_mostly_tasks_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "describe_hardware", lambda *_, **__: MACHINE)  # whatever else keeps this one busy
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(2000))
    oocattn.plan(dataset, causal=True, chunks=553, decomposition="cqs")
    assert "this plan spends" in caplog.text
    assert "leave chunks and decomposition to the plan, which then takes" in caplog.text
    caplog.clear()
    oocattn.plan(dataset, causal=True)
    assert not caplog.text


def test_the_cost_of_a_file_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    measured = file_seconds(tmp_path / "result.oocattn" / "scratch")
    assert 1e-6 <= measured < 1
    assert not list(tmp_path.iterdir())


def test_the_cost_of_a_file_is_assumed_where_none_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert file_seconds(tmp_path / "file" / "scratch") == FILE_SECONDS
    assert file_seconds(Path("/proc")) == FILE_SECONDS


def test_planning_needs_no_heavy_library() -> None:
    """But for the modules that measure: `--help` and `status` import it."""
    names = [path.stem for path in Path(oocattn.__file__).parent.joinpath("planning").glob("*.py")]
    measuring = ("__init__", "host", "kernel_rates", "measure", "reading")
    modules = [f"oocattn.planning.{name}" for name in names if name not in measuring]
    assert len(modules) >= 8
    code = (
        "import importlib, sys, types; package = types.ModuleType('oocattn'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['oocattn'] = package; [importlib.import_module(name) for name in sys.argv[2:]]; "
        "print([name for name in ('torch', 'zarr', 'dask', 'distributed') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(Path(oocattn.__file__).parent), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_need_no_library_at_all() -> None:
    text = Path(oocattn.__file__).parent.joinpath("planning", "options.py").read_text()
    assert [line for line in text.splitlines() if "import " in line and not line.startswith('"""')] == [
        "from __future__ import annotations"
    ]
    assert CHECKPOINT_SECONDS == 60


def test_an_engine_has_a_price_for_a_task() -> None:
    assert TASK_SECONDS["inline"] < TASK_SECONDS["dask"]
