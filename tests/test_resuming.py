"""What was done is not done again, and a resumed run gives the bits of an uninterrupted one; else it is refused."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from support import (
    Recorder,
    Unlocked,
    assert_same_bits,
    carry_out,
    damage,
    normal_arrays,
    plan_for,
    write_dataset,
)

import oocattn
from oocattn import BudgetError, Event, IntegrityError, Plan, ProblemError, ResultExistsError, TimeLimitError
from oocattn.cli.main import main
from oocattn.kernels import get_kernel
from oocattn.kernels.arithmetic import arithmetic_of
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.resuming import find_unfinished
from oocattn.pipelines.session import Resuming, resume_run
from oocattn.planning.measure import count_lanes
from oocattn.planning.stored_plan import read_plan
from oocattn.storage.files.durable import encode_record, read_record
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.journal.journal import Journal
from oocattn.storage.paths import ResultPaths
from oocattn.version import versions

TOKENS = 170


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2))


class EnoughError(BaseException):
    """What interrupts a run: an Exception of a listener would not."""


def interrupt(kind: str, count: int) -> Callable[[Event], None]:
    """A listener that raises at the `count`-th event of a kind."""
    seen = []

    def listen(event: Event) -> None:
        if event.kind == kind:
            seen.append(event)
            if len(seen) == count:
                raise EnoughError

    return listen


def interrupted(plan: Plan, dataset: Path, result: Path, client: Client, kind: str = "written", count: int = 5) -> None:
    with pytest.raises(EnoughError):
        carry_out(plan, dataset, result, client, callbacks=[interrupt(kind, count)])
    assert oocattn.status(result).state == "interrupted"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize(("kind", "count"), [("staged", 1), ("attended", 9), ("merged", 3), ("written", 5), ("written", 14)])
def test_a_resumed_run_gives_the_same_bits(
    client: Client, dataset: Path, result: Path, partials: str, causal: bool, kind: str, count: int
) -> None:
    plan = plan_for(dataset, chunks=13, causal=causal, partials=partials)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    interrupted(plan, dataset, result, client, kind, count)
    recorder = Recorder([])
    found = oocattn.resume(result, client=client, callbacks=[recorder])
    assert_same_bits(found, right)
    assert {**found.out.attrs, "lse": {**found.lse.attrs}} == {**right.out.attrs, "lse": {**right.lse.attrs}}  # checksums
    assert found.report.pairs == right.report.pairs
    assert found.report.bytes_written == right.report.bytes_written
    redone = len(recorder.of("attended"))
    assert recorder.of("started")[0].left == redone
    if kind == "written":
        assert len(recorder.of("written")) <= len([chunk for chunk in range(13) if plan.tokens(chunk)]) * 2 - count
        assert 0 < found.report.pairs_before <= found.report.pairs
        assert "of the pairs were attended before" in str(found.report)
    assert redone <= plan.subproblems - (count if kind == "attended" else 0)
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == {"report.json"}


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_run_may_be_interrupted_many_times(client: Client, dataset: Path, result: Path, partials: str) -> None:
    plan = plan_for(dataset, chunks=13, partials=partials)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    for _ in range(5):  # what is in flight then is finished, too: some three subproblems
        interrupted(plan, dataset, result, client, "attended", 1)
    recorder = Recorder([])
    assert_same_bits(oocattn.resume(result, client=client, callbacks=[recorder]), right)
    assert len(recorder.of("attended")) <= plan.subproblems - 5


def test_a_plan_for_many_lanes_starts_no_more_than_this_machine_has(dataset: Path, result: Path, client: Client) -> None:
    plan = plan_for(dataset, chunks=13, lanes=1024)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    interrupted(plan, dataset, result, client)
    found = oocattn.resume(result)
    assert found.report.lanes == count_lanes("cpu")
    assert_same_bits(found, right)


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_on_other_workers_it_goes_on(dataset: Path, result: Path, partials: str, client: Client) -> None:
    """On more than were planned for, it takes only as many as its memory is meant for."""
    plan = plan_for(dataset, chunks=13, partials=partials, lanes=2)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    for workers, expected in ((1, 1), (3, 2)):
        path = result.with_name(f"{workers}.zarr")
        with local_client(workers=2) as two:
            interrupted(plan, dataset, path, two, "written", 4)
        with local_client(workers=workers) as others:
            found = oocattn.resume(path, client=others)
        assert found.report.lanes == expected
        assert_same_bits(found, right)


def test_the_same_call_resumes_and_the_command_says_so(
    client: Client, dataset: Path, result: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"chunks": 13, "causal": True, "host_memory": "1GiB"}
    right = oocattn.attention(dataset, result.with_name("right.zarr"), client=client, **options)
    attempts: list[Callable[[Path], object]] = [
        lambda path: oocattn.attention(dataset, path, client=client, **options),
        lambda path: main(["run", str(dataset), str(path), "--causal"]),
        lambda path: main(["resume", str(path)]),
    ]
    for number, again in enumerate(attempts):
        path = result.with_name(f"{number}.zarr")
        with pytest.raises(EnoughError):
            oocattn.attention(dataset, path, client=client, callbacks=[interrupt("written", 15)], **options)
        capsys.readouterr()
        caplog.clear()
        again(path)
        assert (f"{path}: resuming the unfinished run" in caplog.text) == (number < 2)
        printed = capsys.readouterr().out
        assert_same_bits(oocattn.resume(path), right)  # finished: it is returned as it is
        assert bool(printed) == bool(number)
        if printed:
            assert "of 26 subproblems are left" in printed
            assert "of the pairs were attended before" in printed


def test_an_overwriting_run_can_be_resumed(client: Client, dataset: Path, result: Path) -> None:
    full, causal = plan_for(dataset, chunks=7), plan_for(dataset, chunks=7, causal=True)
    right = carry_out(causal, dataset, result.with_name("right.zarr"), client)
    carry_out(full, dataset, result, client)
    with pytest.raises(EnoughError):
        carry_out(causal, dataset, result, client, callbacks=[interrupt("written", 3)], overwrite=True)
    assert_same_bits(oocattn.resume(result, client=client), right)


def test_what_is_not_finite_is_counted_once(client: Client, fast_path: Path, result: Path) -> None:
    arrays = normal_arrays(TOKENS, heads=4, kv_heads=2)
    for array, place in zip(arrays, ([0, 1, 5, 0], [0, 1, 60, 2], [0, 0, 120, 3]), strict=True):
        array[tuple(place)] = np.nan
    dataset = write_dataset(fast_path / "nan.zarr", arrays)
    for partials in ("memory", "disk"):
        plan = plan_for(dataset, chunks=13, causal=True, partials=partials)
        path = result.with_name(partials)
        for count in (2, 2, 2):
            interrupted(plan, dataset, path, client, "written", count)
        assert oocattn.resume(path, client=client).report.not_finite == 3


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
    client: Client, dataset: Path, result: Path, garble: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    plan = plan_for(dataset, chunks=13)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    interrupted(plan, dataset, result, client)
    records = sorted((ResultPaths.at(result).state / "finished").iterdir())
    victim = records[2]
    victim.write_bytes(encode_record(garble(read_record(victim))))
    recorder = Recorder([])
    found = oocattn.resume(result, client=client, callbacks=[recorder])
    assert_same_bits(found, right)
    assert found.out.attrs["checksums"] == right.out.attrs["checksums"]
    redone = {f"{event.head_group}-{event.index}.json" for event in recorder.of("written")}
    assert redone.isdisjoint(path.name for path in records if path != victim)
    assert victim.name in redone


# What is not resumed


def test_there_must_be_something_to_resume(client: Client, dataset: Path, result: Path) -> None:
    with pytest.raises(ProblemError, match=r"result\.zarr: no run to resume; begin one"):
        oocattn.resume(result, client=client)
    done = carry_out(plan_for(dataset), dataset, result, client)
    assert oocattn.resume(result, client=client).path == done.path


def test_a_run_of_something_else_is_not_touched(client: Client, dataset: Path, result: Path, fast_path: Path) -> None:
    plan = plan_for(dataset, chunks=13, causal=True)
    interrupted(plan, dataset, result, client)
    other = write_dataset(fast_path / "other.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, seed=1))
    refused: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (dataset, {}, ResultExistsError, r"unfinished run of another problem \(causal True, now False\)"),
        (other, {"causal": True}, ResultExistsError, rf"unfinished run of another dataset \({dataset}, now {other}\)"),
        (dataset, {"causal": True, "chunks": 7}, ResultExistsError, "has chunks 13, not 7"),
        (dataset, {"causal": True, "decomposition": "strips"}, ResultExistsError, "has decomposition cqs, not strips"),
        (dataset, {"causal": True, "kernel": "reference"}, ResultExistsError, "has kernel cpu, not reference"),
        (dataset, {"causal": True, "host_memory": 1000}, BudgetError, "takes .* of host memory, more than 1000 B"),
    ]
    for asked, options, error, message in refused:
        with pytest.raises(error, match=message):
            oocattn.attention(asked, result, client=client, **options)
    with pytest.raises(ResultExistsError, match=r"another plan \(chunks 13, now 7; chunk rows 14, now 25; .*\)"):
        carry_out(plan_for(dataset, chunks=7, causal=True), dataset, result, client)
    assert oocattn.resume(result, client=client).report.pairs_before > 0


def test_another_run_than_was_asked_for_is_not_resumed(client: Client, dataset: Path, result: Path) -> None:
    """It has begun in the seconds in which a cluster starts."""
    plan, causal = plan_for(dataset, chunks=13), plan_for(dataset, chunks=13, causal=True)
    interrupted(plan, dataset, result, client)
    paths = ResultPaths.at(result)
    asked = find_unfinished(paths)
    with pytest.raises(EnoughError):
        carry_out(causal, dataset, result, client, callbacks=[interrupt("written", 5)], overwrite=True)
    with pytest.raises(ResultExistsError, match=r"than when the command began \(causal False, now True\): resume again"):
        resume_run(asked, Dataset.open(dataset), paths, client, (), math.inf, Resuming())
    assert_same_bits(
        oocattn.resume(result, client=client), carry_out(causal, dataset, result.with_name("right.zarr"), client)
    )


def test_a_damaged_journal_costs_no_finished_result(client: Client, dataset: Path, result: Path) -> None:
    done = carry_out(plan_for(dataset), dataset, result, client)
    (ResultPaths.at(result).state / "plan.json").write_text("damaged")
    assert oocattn.attention(dataset, result, client=client).path == done.path


def test_a_dataset_that_changed_is_refused(client: Client, dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=13)
    interrupted(plan, dataset, result, client)
    for name in "kv":
        os.utime(dataset / name / "c/0/0/0/0", ns=(1, 1))
    for again in (
        lambda: oocattn.resume(result, client=client),
        lambda: carry_out(plan, dataset, result, client),
    ):
        with pytest.raises(IntegrityError, match=r"zarr: k and v of the dataset changed .* since the run in .* began"):
            again()
    assert carry_out(plan, dataset, result, client, overwrite=True).report.pairs_before == 0


def test_a_chunk_that_was_written_is_noticed_though_size_and_time_are_set_back(
    client: Client, dataset: Path, result: Path
) -> None:
    """A copy, or files that were only touched, are named by who knows that they are the same."""
    plan = plan_for(dataset, chunks=13)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    interrupted(plan, dataset, result, client)
    chunk = dataset / "k/c/0/0/0/0"
    status = chunk.stat()
    chunk.write_bytes(chunk.read_bytes())
    os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))
    for again in (
        lambda: oocattn.resume(result, client=client),
        lambda: carry_out(plan, dataset, result, client),
    ):
        with pytest.raises(IntegrityError, match=r"zarr: files of k of the dataset were replaced or written .*--dataset"):
            again()
    assert_same_bits(oocattn.resume(result, client=client, dataset=dataset), right)


def test_another_version_does_not_go_on(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plan_for(dataset, chunks=13), dataset, result, client)
    monkeypatch.setattr("oocattn.pipelines.resuming.versions", lambda: {"oocattn": "99"})
    with pytest.raises(ResultExistsError, match=r"unfinished run of another oocattn \(0\.1\.0, now 99\)"):
        oocattn.resume(result, client=client)


def other_arithmetic(*arguments: Any) -> dict[str, str]:
    """What a worker with another torch, on another processor, says of itself."""
    return {**arithmetic_of(*arguments), "torch": "99", "cpu": "AVX99"}


def test_other_bits_are_refused_or_accepted_and_reported(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=13)
    interrupted(plan, dataset, result, client)
    words = rf"was begun with torch {re.escape(versions()['torch'])}, now 99; cpu .*, now AVX99: .*--accept-other-bits"
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


def test_a_processor_that_computes_otherwise_is_told(dataset: Path) -> None:
    """The bits of a small call differ where torch takes other vector instructions, and not with the number of threads."""
    script = (
        "import torch, sys; from oocattn.kernels.arithmetic import arithmetic_of; torch.set_num_threads(int(sys.argv[1])); "
    )
    script += "print(arithmetic_of('cpu', 64, 'float32', 'cpu'))"
    said = {}
    for name, capability, threads in (("one", None, "1"), ("two", None, "2"), ("other", "default", "1")):
        environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": capability} if capability else {})}
        command = [sys.executable, "-c", script, threads]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said[name] = ended.stdout
    assert said["one"] == said["two"]
    assert said["other"] != said["one"]


@pytest.mark.parametrize("everything", [False, True])
def test_checksums_of_finished_chunks_are_compared(
    client: Client,
    dataset: Path,
    result: Path,
    everything: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = plan_for(dataset, chunks=13, causal=True)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    interrupted(plan, dataset, result, client, "written", 8)
    unfinished = ResultPaths.at(result).unfinished
    damaged = sorted((unfinished / "lse").glob("c.0.0.*"))[0]  # of the chunk that is compared last
    damage(damaged, lambda content: bytes([content[0] ^ 1]) + content[1:])
    monkeypatch.setattr("oocattn.pipelines.session.COMPARE_SECONDS", -1.0)
    found = oocattn.resume(result, client=client, check_finished=everything)
    if not everything:
        assert re.search(r"the checksums of 0 of \d+ finished chunks were compared", caplog.text)
        assert not oocattn.verify(result).passed
        return
    assert_same_bits(found, right)
    assert found.report.recomputed == 1
    assert "finished chunks were compared" not in caplog.text
    assert re.search(r"before +(\d+) chunks finished, checksums of \1 compared", str(found.report))


def test_comparing_ends_with_the_time_limit(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plan_for(dataset, chunks=13), dataset, result, client, "written", 8)
    compared = []

    def slowly(*_: object) -> bool:
        compared.append(time.sleep(0.5))
        return True

    monkeypatch.setattr("oocattn.pipelines.finished._matches", slowly)
    with pytest.raises(TimeLimitError):
        oocattn.resume(result, client=client, check_finished=True, time_limit=1.0)
    assert len(compared) <= 3


def test_a_dataset_that_was_moved_is_named(client: Client, dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=13)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    interrupted(plan, dataset, result, client)
    moved = dataset.rename(dataset.with_name("moved.zarr"))
    with pytest.raises(ProblemError, match="no Zarr group at"):
        oocattn.resume(result, client=client)
    assert_same_bits(oocattn.resume(result, client=client, dataset=moved), right)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: {**header, "format": 99},
        lambda header: {**header, "plan": {**header["plan"], "chunks": 7}},
        lambda header: {**header, "plan": {**header["plan"], "chunk_rows": 1}},
        lambda header: {name: header[name] for name in ("format", "plan")},
        lambda header: {**header, "plan": {}},
        lambda header: {**header, "plan": {**header["plan"], "surprise": 1}},
    ],
)
def test_a_journal_that_cannot_be_ours_is_refused(
    client: Client, dataset: Path, result: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    plan = plan_for(dataset, chunks=13)
    interrupted(plan, dataset, result, client)
    path = ResultPaths.at(result).state / "plan.json"
    header = json.loads(path.read_bytes().partition(b" ")[2])
    path.write_bytes(encode_record(change(header)))
    with pytest.raises(IntegrityError, match=r"not the journal of a run that can be resumed .*: begin again"):
        oocattn.resume(result, client=client)
    assert carry_out(plan, dataset, result, client, overwrite=True).path == result


def test_a_plan_survives_its_journal(dataset: Path) -> None:
    plans = [
        plan_for(dataset, causal=True, **options) for options in ({"chunks": 13}, {"chunks": 5, "decomposition": "strips"})
    ]
    most = oocattn.plan(dataset, host_memory=2**96, device_memory=2**96, checkpoint_interval=1e9, lanes=5000, kernel="cpu")
    for plan in (*plans, most):
        assert read_plan(json.loads(json.dumps(plan.to_json())), lambda kernel, _: get_kernel(kernel).scratch_bytes) == plan


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("flips", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_flipped_bits_are_mended_or_refused(
    client: Client, dataset: Path, result: Path, partials: str, flips: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any place of the journal, the partials and the checkpoints: never a wrong result."""
    plan, chance = plan_for(dataset, chunks=13, causal=True, partials=partials), random.Random(0)
    right = carry_out(plan, dataset, result.with_name("right.zarr"), client)
    paths, mended, refused = ResultPaths.at(result), 0, 0
    for _ in range(flips):
        with pytest.raises(EnoughError):
            carry_out(plan, dataset, result, client, callbacks=[interrupt("written", 8)], overwrite=True)
        files = [paths.state / "plan.json", *(paths.state / "finished").iterdir(), *paths.scratch.iterdir()]
        victim = chance.choice(files)
        content = bytearray(victim.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        if victim.name == "plan.json":
            with pytest.raises(IntegrityError, match=r"plan\.json: the record is damaged"):
                oocattn.resume(result, client=client)
            refused += 1
            continue
        assert_same_bits(oocattn.resume(result, client=client), right)
        mended += 1
    assert mended > flips // 2
    with capsys.disabled():
        print(f" {mended} of {flips} mended, {refused} refused ", end="")


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("victim", ["run", "worker"])
def test_what_is_killed_gives_the_same_bits(partials: str, victim: str) -> None:
    """A few of the moments at which `tests/killing.py` can kill a run or a worker."""
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), "--moments", "4", "--partials", partials, "--grace", "10"]
    command += ["--workers"] if victim == "worker" else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), str(script.parent)])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "4 of 4 bit-identical" in ended.stdout


def test_a_record_of_another_run_counts_for_nothing(fast_path: Path) -> None:
    first = Journal.begin(fast_path, {"begun": 1}, Unlocked())
    first.finish(0, 3, {"pairs": 7})
    assert first.finished() == {(0, 3): {"pairs": 7}}
    assert Journal(fast_path, "another").finished() == {}
    record = fast_path / "finished" / "0-3.json"
    (fast_path / "finished" / "0-4.json").write_bytes(record.read_bytes()[:-9])
    (fast_path / "finished" / "what-ever.json").write_bytes(record.read_bytes())
    assert first.finished() == {(0, 3): {"pairs": 7}}
