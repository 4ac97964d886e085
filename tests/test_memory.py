"""The host budget is kept: what a run allocates grows by no more than it was given, however large the dataset.

What is measured is the process's anonymous memory; page cache and mapped files are the kernel's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import plan_for

import oocattn
from oocattn import BudgetError
from oocattn.storage.make.synth import synthesise

MIB = 1 << 20
ALLOWANCE = 64 * MIB
"""For what is not the plan's: the interpreter, the event loop and the dashboard of the cluster, heap fragmentation."""

SMALL_ALLOWANCE = 40 * MIB
"""The same after a run of the same process, which has brought much of it about: 27 MiB were seen."""


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list of which the last element is the most anonymous memory since, sampled every 20 ms."""
    most = [anonymous_bytes()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most.append(max(most[-1], anonymous_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def growth_of_a_run(folder: Path, host_memory: int, causal: bool, warm: bool = True) -> tuple[int, float]:
    """Run `folder`/dataset.zarr; return how many bytes the process grew by, after a tiny run, and the seconds."""
    if warm:
        synthesise(folder / "tiny.zarr", tokens=64, heads=1, head_dim=8, dtype="float32")
        oocattn.attention(folder / "tiny.zarr", folder / "tiny-result.zarr")
    before = anonymous_bytes()
    start = time.time()
    with watched() as most:
        oocattn.attention(
            folder / "dataset.zarr",
            folder / "result.zarr",
            causal=causal,
            host_memory=host_memory,
            device_memory=host_memory,
        )
    return most[-1] - before, time.time() - start


def growth_of_a_second_run(folder: Path, host_memory: int, causal: bool) -> tuple[int, float]:
    """The same after a run of the same dataset, which has loaded a GPU's libraries and the memory that they keep."""
    options = {"causal": causal, "host_memory": host_memory, "device_memory": "1GiB"}
    oocattn.attention(folder / "dataset.zarr", folder / "first.zarr", **options)
    before = anonymous_bytes()
    start = time.time()
    with watched() as most:
        oocattn.attention(folder / "dataset.zarr", folder / "second.zarr", **options)
    return most[-1] - before, time.time() - start


def growth_of_a_survey(folder: Path) -> tuple[int, int]:
    """Survey `folder`/result.zarr; return how many bytes the process grew by, after a tiny survey, and what was planned."""
    synthesise(folder / "tiny.zarr", tokens=64, heads=1, head_dim=8, dtype="float16")
    oocattn.attention(folder / "tiny.zarr", folder / "tiny-result.zarr", engine="inline")
    oocattn.survey(folder / "tiny-result.zarr", arrays=["entropy"], engine="inline")
    before = anonymous_bytes()
    with watched() as most:
        found = oocattn.survey(folder / "result.zarr", arrays=["entropy"], engine="inline")
    assert found.plan is not None
    return most[-1] - before, found.plan.peak_host


def in_a_new_process(folder: Path, *arguments: object, function: str = "growth_of_a_run") -> tuple[int, float]:
    """What a function of this module finds in a process that has allocated nothing else."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        f"from test_memory import {function}\n"
        f"print(*{function}(Path({str(folder)!r}), *{arguments!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(oocattn.__file__).parents[1]
    )
    growth, seconds = done.stdout.split()[-2:]
    return int(growth), float(seconds)


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_hundred_mebibytes_in_little_more_than_the_least_that_works(tmp_path: Path, causal: bool) -> None:
    dataset = tmp_path / "dataset.zarr"
    synthesise(dataset, tokens=1024, heads=128, kv_heads=64, head_dim=96, dtype="float32")  # 96 MiB, of short products
    with pytest.raises(BudgetError) as refused:
        oocattn.plan(dataset, causal=causal, host_memory=1)
    budget = int(re.search(r"works is (\d+)MiB", str(refused.value))[1]) * MIB + 4 * MIB
    assert budget < 48 * MIB
    growth, _ = in_a_new_process(tmp_path, budget, causal)
    assert growth <= budget + SMALL_ALLOWANCE
    assert plan_for(dataset, causal=causal).peak_host > budget  # a free choice takes more: the budget did bind


def test_a_survey_of_many_keys_takes_what_its_plan_says(fast_path: Path) -> None:
    synthesise(fast_path / "dataset.zarr", tokens=16, keys=1 << 23, heads=1, head_dim=2, dtype="float16")
    oocattn.attention(fast_path / "dataset.zarr", fast_path / "result.zarr", engine="inline")
    growth, planned = in_a_new_process(fast_path, function="growth_of_a_survey")
    assert growth <= planned + SMALL_ALLOWANCE, "the numbers of its keys are twice 64 MiB"


@pytest.mark.slow
def test_two_gibibytes_in_an_eighth_of_it(tmp_path: Path) -> None:
    synthesise(tmp_path / "dataset.zarr", tokens=16384, heads=44, head_dim=256, dtype="float32")
    size = sum(path.stat().st_size for path in (tmp_path / "dataset.zarr").rglob("*") if path.is_file())
    assert size >= 2 << 30
    growth, seconds = in_a_new_process(tmp_path, 256 * MIB, True)
    print(f"grew by {growth / MIB:.0f} MiB in {seconds:.0f} s")
    assert growth <= 256 * MIB + ALLOWANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_pinned_memory_keeps_the_host_budget(tmp_path: Path, causal: bool) -> None:
    """What is pinned is anonymous memory too; partials go to disk where accumulators do not fit."""
    dataset = tmp_path / "dataset.zarr"
    synthesise(dataset, tokens=100_003, heads=4, head_dim=64, dtype="float16")  # 147 MiB
    with pytest.raises(BudgetError) as refused:
        oocattn.plan(dataset, causal=causal, host_memory=1, device_memory="1GiB")
    least = int(re.search(r"works is (\d+)MiB", str(refused.value))[1]) * MIB
    for budget in (least + 16 * MIB, 512 * MIB):
        growth, _ = in_a_new_process(tmp_path, budget, causal, function="growth_of_a_second_run")
        assert growth <= budget + SMALL_ALLOWANCE
        for result in ("first", "second"):
            shutil.rmtree(tmp_path / f"{result}.zarr")
