"""Damage to what an interrupted run left on disk never gives a wrong result: it is computed again, or refused."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupting import interrupted, uninterrupted, write_resuming_dataset
from support import (
    Recorder,
    Unlocked,
    assert_same_bits,
    carry_out,
    damage,
    plan_for,
)

import oocattn
from oocattn import IntegrityError, TimeLimitError
from oocattn.storage.files.durable import encode_record, read_record
from oocattn.storage.journal.journal import Journal
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_resuming_dataset(fast_path)


@pytest.mark.parametrize(
    "garble",
    [
        lambda record: {name: value for name, value in record.items() if name != "out"},
        lambda record: {**record, "lse": record["lse"][:-1]},
        lambda record: {**record, "out": record["out"] + "00000000"},
        lambda record: {**record, "lse": "G" + record["lse"][1:]},
        lambda record: {**record, "out": 7},
        lambda record: {**record, "pairs": "7"},
        lambda record: {**record, "bytes": -1},
    ],
)
def test_a_record_without_its_checksums_counts_for_nothing(
    dataset: Path,
    result: Path,
    garble: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    plan = plan_for(dataset, chunks=7)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result)
    records = sorted((ResultPaths.at(result).state / "finished").iterdir())
    victim = records[2]
    victim.write_bytes(encode_record(garble(read_record(victim))))
    recorder = Recorder([])
    found = oocattn.resume(result, engine="inline", callbacks=[recorder])
    assert_same_bits(found, right)
    assert found.out.attrs["checksums"] == right.out.attrs["checksums"]
    redone = {f"{event.head_group}-{event.index}.json" for event in recorder.of("written")}
    assert redone.isdisjoint(path.name for path in records if path != victim)
    assert victim.name in redone


def test_a_record_of_another_run_counts_for_nothing(fast_path: Path) -> None:
    first = Journal.begin(fast_path, {"begun": 1}, Unlocked())
    first.finish(0, 3, {"pairs": 7})
    assert first.finished() == {(0, 3): {"pairs": 7}}
    assert Journal(fast_path, "another").finished() == {}
    record = fast_path / "finished" / "0-3.json"
    (fast_path / "finished" / "0-4.json").write_bytes(record.read_bytes()[:-9])
    (fast_path / "finished" / "what-ever.json").write_bytes(record.read_bytes())
    assert first.finished() == {(0, 3): {"pairs": 7}}


def test_a_damaged_journal_costs_no_finished_result(dataset: Path, result: Path) -> None:
    done = carry_out(plan_for(dataset), dataset, result)
    (ResultPaths.at(result).state / "plan.json").write_text("damaged")
    assert oocattn.attention(dataset, result, engine="inline").path == done.path


@pytest.mark.parametrize("everything", [False, True])
def test_checksums_of_finished_chunks_are_compared(
    dataset: Path,
    result: Path,
    everything: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, "written", 8)
    unfinished = ResultPaths.at(result).unfinished
    damaged = sorted((unfinished / "lse").glob("c.0.0.*"))[0]  # of the chunk that is compared last
    damage(damaged, lambda content: bytes([content[0] ^ 1]) + content[1:])
    monkeypatch.setattr("oocattn.pipelines.session.COMPARE_SECONDS", -1.0)
    found = oocattn.resume(result, engine="inline", check_finished=everything)
    if not everything:
        assert re.search(r"the checksums of 0 of \d+ finished chunks were compared", caplog.text)
        assert not oocattn.verify(result).passed
        return
    assert_same_bits(found, right)
    assert found.report.recomputed == 1
    assert "finished chunks were compared" not in caplog.text
    assert re.search(r"before +(\d+) chunks finished, checksums of \1 compared", str(found.report))


def test_comparing_checksums_of_finished_chunks_ends_with_the_time_limit(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plan_for(dataset, chunks=7), dataset, result, "written", 8)
    compared = []

    def slowly(*_: object) -> bool:
        compared.append(time.sleep(0.5))
        return True

    monkeypatch.setattr("oocattn.pipelines.finished._matches", slowly)
    with pytest.raises(TimeLimitError):
        oocattn.resume(result, engine="inline", check_finished=True, time_limit=1.0)
    assert len(compared) <= 3


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("flips", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_recovered_or_refused(dataset: Path, result: Path, partials: str, flips: int) -> None:
    """In any place of the journal, the partials and the checkpoints: never a wrong result."""
    plan, chance = plan_for(dataset, chunks=7, causal=True, partials=partials), random.Random(0)
    paths, recovered = ResultPaths.at(result), 0
    interrupted(plan, dataset, result, "written", 8)
    kept = paths.state.rename(paths.state.with_name("kept"))
    for _ in range(flips):
        shutil.rmtree(result, ignore_errors=True)
        shutil.rmtree(paths.state, ignore_errors=True)
        shutil.copytree(kept, paths.state)
        files = [paths.state / "plan.json", *(paths.state / "finished").iterdir(), *paths.scratch.iterdir()]
        victim = chance.choice(sorted(files))
        content = bytearray(victim.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        if victim.name == "plan.json":
            with pytest.raises(IntegrityError, match=r"plan\.json: the record is damaged"):
                oocattn.resume(result, engine="inline")
        else:
            assert_same_bits(oocattn.resume(result, engine="inline"), uninterrupted(plan, dataset))
            recovered += 1
    assert recovered > flips // 2
