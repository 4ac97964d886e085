"""A bench compares every way on the same rows, survives the failure of any, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import normal_arrays, write_dataset

from oocattn import Plan, ProblemError
from oocattn.bench import Ceiling, Progress, Row, Table, bench, comparison, competitors, resident
from oocattn.problem.arrays import ArraySpec
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import make_problem
from oocattn.storage.inputs.dataset import Dataset

NAMES = ["resident call", "query-stationary loop", "oocattn, from memory", "oocattn, page cache", "oocattn, cold disk"]
CEILINGS = (
    Ceiling("kernel", 1e9, "FLOP/s"),
    Ceiling("disk read, warm", 1e9, "B/s"),
    Ceiling("disk write, with fsync", 1e8, "B/s"),
)
TINY: dict[str, Any] = {"tokens": 2048, "heads": 2, "head_dim": 16, "kernel": "cpu", "host_memory": "64MiB", "rows": 8}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folder of a bench and what it takes for a file system in memory; both empty."""
    places = [tmp_path / "disk", tmp_path / "memory"]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(comparison, "MEMORY_FOLDER", places[1])
    monkeypatch.setattr(comparison.ceilings, "BYTES", 1 << 20)
    monkeypatch.setitem(competitors.TILE, "cpu", 512)  # several tiles of 2,048 tokens
    return places


def left(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in folder.iterdir()]


def table_of(records: list[object]) -> Table:
    assert isinstance(records[-1], Table)
    return records[-1]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"repeats": 2, "dtype": "float16"}, "causal"),
        ({"repeats": 1, "dtype": "bfloat16", "kv_heads": 1, "causal": False}, "full"),
        ({"repeats": 1, "dtype": "float16", "cu_seqlens_q": [0, 500, 500, 2048]}, "causal, 3 documents"),
    ],
)
def test_every_row_is_timed_and_right_and_nothing_stays(folders: list[Path], options: dict[str, Any], kind: str) -> None:
    records = list(bench(folders[0], **TINY, **options))
    assert left(folders) == []
    assert isinstance(records[0], Plan)
    ceilings = [record for record in records if isinstance(record, Ceiling)]
    assert [ceiling.name for ceiling in ceilings] == [
        "kernel cpu",
        "disk read, cold",
        "disk read, warm",
        "disk write, with fsync",
    ]
    assert all(ceiling.rate > 0 for ceiling in ceilings)
    table = table_of(records)
    assert [row.name for row in table.rows] == NAMES
    for row in table.rows:
        assert len(row.seconds) == options["repeats"], row
        assert row.error is not None
        assert 0 < row.error < {"float16": 5e-4, "bfloat16": 4e-3}[options["dtype"]], row
        assert (row.report is not None) == row.name.startswith("oocattn")
    text = str(table)
    assert f"2,048 tokens x D = 16, {options['dtype']}, {kind}: seconds are medians" in text
    assert "of the kernel's ceiling" in text
    assert "of what is attended of q, k and v; k and v at most 1.00 times" in text
    assert "reading it once and writing out and lse take" in text


def test_rounds_take_turns_after_a_warm_up_that_can_be_left_out(folders: list[Path]) -> None:
    rounds = [f"{turn}, {name}" for turn in ("warm-up", "round 1 of 1") for name in NAMES]
    records = list(bench(folders[0], **TINY, repeats=1))
    assert [record.what for record in records if isinstance(record, Progress)][2:] == rounds
    records = list(bench(folders[0], **TINY, repeats=1, warm_up=False))
    assert [record.what for record in records if isinstance(record, Progress)][2:] == rounds[len(NAMES) :]


def test_a_competitor_that_fails_says_so_and_the_others_go_on(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 EiB")

    monkeypatch.setattr(resident, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(comparison, "MEMORY_FOLDER", folders[1] / "nowhere")
    table = table_of(list(bench(folders[0], **TINY, repeats=1)))
    assert {row.name: row.note for row in table.rows if row.note} == {
        "resident call": "out of memory",
        "oocattn, from memory": f"there is no {folders[1] / 'nowhere'}",
    }
    others = [row for row in table.rows if not row.note]
    assert all(len(row.seconds) == 1 for row in others)
    assert table.reference == min(others, key=lambda row: row.median)
    assert f"ratios are to the {table.reference.name}" in str(table)
    assert left(folders) == []


def test_what_no_library_computes_is_said_and_the_others_compute_it(folders: list[Path]) -> None:
    asked = {"window_size": (99, 0), "sink_tokens": 4, "alibi_slopes": [0.1, 0.2], "keys": 3000, "value_dim": 8}
    table = table_of(list(bench(folders[0], **TINY, **asked, repeats=1, warm_up=False)))
    assert table.row("resident call").note == "no call of the library has sink_tokens, alibi_slopes"
    assert all(row.error < 5e-4 for row in table.rows[1:])  # type: ignore[operator]


def test_a_wrong_result_shows(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = resident.scaled_dot_product_attention
    monkeypatch.setattr(resident, "scaled_dot_product_attention", lambda *args, **options: 1.5 * right(*args, **options))
    table = table_of(list(bench(folders[0], **TINY, repeats=1, warm_up=False)))
    assert table.row("resident call").error == pytest.approx(0.5, rel=0.01)


def test_the_table_compares_medians_with_the_resident_call() -> None:
    problem = make_problem(*(ArraySpec(name, (1, 100, 8), "float32") for name in "qkv"))
    rows = (
        Row("resident call", (2.0, 9.0, 1.0), 3 << 30, 1.2e-3),
        Row("oocattn, page cache", (1.0, 1.0, 1.5), 1 << 30, 3e-4),
        Row("other", note="out of memory"),
    )
    lines = str(Table(problem, rows, CEILINGS)).splitlines()
    assert lines[3].split() == ["resident", "call", "2", "1", "to", "9", "1.00", "3", "GiB", "1.2e-03"]
    assert lines[4].split() == ["oocattn,", "page", "cache", "1", "1", "to", "1.5", "0.50", "1", "GiB", "3.0e-04"]
    assert lines[5].split(maxsplit=1) == ["other", "out of memory"]


def test_the_package_of_the_authors_is_called_as_it_wants_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal_arrays(64, heads=2, kv_heads=2)
    dataset = Dataset.open(write_dataset(tmp_path / "qkv.zarr", (q, k, v)))
    problem = make_problem(*dataset.specs, ProblemOptions(causal=True))
    asked: dict[str, object] = {}

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple[torch.Tensor, str]:
        asked.update(options)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).float(), "info"

    monkeypatch.setitem(sys.modules, "stream_cqsa", SimpleNamespace(stream_cqsa_forward=forward))
    entrant = competitors.StreamCqsa(competitors.Inputs.load(dataset, problem, "cpu"))
    entrant.prepare()
    entrant.run()
    expected = {"causal": True, "min_itr": 1, "stream_from_host": True, "low_memory": True, "out_device": "acc"}
    assert asked == expected
    np.testing.assert_allclose(entrant.rows([(0, 1, 0)])[0], v[0, 1, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folder": "nowhere"}, "there is no such folder"),
        ({"tokens": 1 << 47}, "lower tokens"),
        ({"repeats": 0}, "repeats = 0 .*at least 1"),
        ({"dtype": "float64"}, "float64"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    folders: list[Path], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ProblemError, match=says):
        next(bench(**{"folder": folders[0], **TINY, **options}))
    assert left(folders) == []


def test_closing_a_bench_early_removes_everything(folders: list[Path]) -> None:
    records = bench(folders[0], **TINY)
    while not (isinstance(record := next(records), Progress) and "oocattn, from memory" in record.what):
        pass
    assert len(left(folders)) == 2
    records.close()
    assert left(folders) == []


def test_ctrl_c_removes_everything(folders: list[Path]) -> None:
    options = ["--tokens", "8K", "--heads", "2", "--kernel", "cpu", "--repeats", "50", "--folder", str(folders[0])]
    process = subprocess.Popen(
        [sys.executable, "-m", "oocattn", "bench", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background makes them, and this child, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while "query-stationary" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.1)  # in the middle of a run of oocattn
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "oocattn: interrupted"
    assert left(folders) == []
    assert not list(Path("/dev/shm").glob(f"oocattn-bench-{process.pid}-*"))
