"""Cores that a process may use, by its processors and its control group's quota, and those of several on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from oocattn import cores
from oocattn.cores import Cores, UsableCores, shared_cores, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 processors, of which two share a core each, without a quota; its control group is the folder."""
    for processor in range(8):
        (tmp_path / f"cpu{processor}").write_text(f"{processor % 4},{processor % 4 + 4}\n")
    monkeypatch.setattr(cores, "_SIBLINGS", f"{tmp_path}/cpu{{}}")
    monkeypatch.setattr(cores, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(cores, "_processors", lambda: list(range(8)))
    return tmp_path


def test_processors_that_share_a_core_count_as_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores().at_once == 4
    monkeypatch.setattr(cores, "_processors", lambda: [1, 5, 2])
    assert usable_cores() == UsableCores(("1,5", "2,6"), 2)


def test_where_the_system_does_not_say_each_processor_is_a_core(machine: Path) -> None:
    for processor in range(8):
        (machine / f"cpu{processor}").unlink()
    assert usable_cores().at_once == 8


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "9900000 100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.max": "nonsense"}, 4),
        ({"cpu.max": "100000 0"}, 4),
    ],
    ids=str,
)
def test_a_quota_bounds_the_cores(machine: Path, files: dict[str, str], expected: int) -> None:
    (machine / "cpu").mkdir()
    for name, content in files.items():
        (machine / name).write_text(content)
    assert usable_cores().at_once == expected


def test_processes_share_the_cores_that_they_have_in_common() -> None:
    everything = tuple("abcd")
    assert shared_cores([UsableCores(everything, 4)] * 8) == Cores(4, 4)
    assert shared_cores([UsableCores(everything, 2)] * 8) == Cores(2, 2)  # a quota is that of all
    assert shared_cores([UsableCores((name,), 1) for name in everything]) == Cores(4, 1)
    assert shared_cores([UsableCores(("a", "b"), 2), UsableCores(("b", "c", "d"), 3)]) == Cores(4, 2)
    assert shared_cores([UsableCores(everything, 4, 5.0), UsableCores(everything, 4, 3.0)]) == Cores(4, 4, 3.0)
