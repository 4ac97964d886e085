"""What a run takes besides its longest link: files after the last computing, and cores that bytes take from a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import GPU, MACHINE, normal_arrays, plan_for, replanned, write_dataset

from oocattn.planning import cost
from oocattn.planning.measured import RUN_FILES, TASK_SHARE

SLOW = replace(MACHINE, kernel_flops=1e4)
"""A machine on which computing always takes longest."""


@pytest.mark.parametrize("machine", [SLOW, replace(GPU, kernel_flops=1e4)])
@pytest.mark.parametrize(("heads", "last"), [(1, 1.0), (4, 0.25)])
def test_nothing_hides_the_files_of_the_last_chunk_and_of_the_commit(
    fast_path: Path, heads: int, last: float, machine: object
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(256, heads=heads, kv_heads=heads))
    plan = plan_for(dataset, chunks=1, machine=machine)
    assert plan.binds == "compute"
    slower = replanned(plan, file_seconds=plan.machine.file_seconds + 0.5)
    files = 3 * heads  # out, lse, and an entry of the journal
    assert slower.seconds - plan.seconds == pytest.approx(0.5 * (last * files + RUN_FILES), rel=1e-3)


def test_where_files_bind_they_count_once(fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(256, heads=4, kv_heads=4))
    plan = replanned(plan_for(dataset, chunks=1), file_seconds=1.0)
    slower = replanned(plan, file_seconds=2.0)
    assert slower.seconds - plan.seconds == pytest.approx(12 + RUN_FILES)


@pytest.mark.parametrize(("machine", "share"), [(SLOW, TASK_SHARE), (replace(GPU, kernel_flops=1e4), 0.0)])
def test_bytes_take_cores_from_a_cpu_alone(
    fast_path: Path, machine: object, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(4096, head_dim=64))
    plan = plan_for(dataset, chunks=1, machine=machine)
    for name, link in (("CORE_READ_RATE", "read"), ("CORE_WRITE_RATE", "write")):
        with monkeypatch.context() as patched:
            patched.setattr(cost, name, 1e3)
            slower = replanned(plan).seconds - plan.seconds
        assert slower == pytest.approx(share * plan.link(link).amount / 1e3, rel=1e-3)
