"""A run commits, replaces and deletes what is its own and nothing else, whoever else is at work in the same places."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client
from interrupting import EnoughError, interrupt, interrupted, uninterrupted
from support import BESIDE, Recorder, assert_same_bits, bits, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, IntegrityError, LockedError, ResultExistsError
from oocattn.cli.main import main
from oocattn.storage.journal import lock
from oocattn.storage.journal.claims import Holder
from oocattn.storage.paths import ResultPaths

OTHER = Holder("elsewhere", 17, "another kernel", "another token")


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_first(kind: str, action: Callable[[], object]) -> Callable[[Event], None]:
    """A listener that acts on the first event of a kind."""
    seen: list[Event] = []

    def listen(event: Event) -> None:
        if event.kind == kind and not seen:
            seen.append(event)
            action()

    return listen


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finished_result_that_appears_during_a_run_is_not_replaced(dataset: Path, result: Path, overwrite: bool) -> None:
    plan = plan_for(dataset, chunks=7)
    other = carry_out(plan_for(dataset, chunks=7, causal=True), dataset, result.with_name("other.zarr")).path
    if overwrite:
        carry_out(plan, dataset, result)

    def appear() -> None:
        shutil.rmtree(result, ignore_errors=True)
        shutil.copytree(other, result)

    with pytest.raises(ResultExistsError, match="has appeared, or was replaced, while the run was under way: move it away"):
        carry_out(plan, dataset, result, callbacks=[at_first("merged", appear)], overwrite=overwrite)
    assert {path.relative_to(result): content for path, content in everything(result).items()} == {
        path.relative_to(other): content for path, content in everything(other).items()
    }
    result.rename(result.with_name("away.zarr"))
    assert oocattn.resume(result, engine="inline").path == result


@pytest.mark.parametrize("inside", ["data.zarr", "partials/data.zarr", "result-01234567.zarr", "trash-01234567"])
def test_a_dataset_in_the_folder_of_job_state_is_refused_and_left(fast_path: Path, result: Path, inside: str) -> None:
    place = ResultPaths.at(result).state / inside
    place.parent.mkdir(parents=True)
    dataset = write_dataset(place, normal_arrays(170, heads=4, kv_heads=2))
    before = everything(dataset)
    with pytest.raises(ResultExistsError, match=r"result\.zarr\.oocattn belongs to the dataset"):
        oocattn.attention(dataset, result, engine="inline")
    assert everything(dataset) == before


def test_files_of_others_in_what_is_overwritten_are_named_and_left(
    dataset: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carry_out(plan_for(dataset, chunks=7), dataset, result)
    synth = [
        "synth",
        str(dataset),
        "--tokens",
        "100",
        "--heads",
        "1",
        "--head-dim",
        "8",
        "--dtype",
        "float32",
        "--overwrite",
    ]
    run = ["run", str(dataset), str(result), "--causal", "--overwrite"]
    for path, command in ((dataset / "q/notes.txt", synth), (result / "lse/notes.txt", run)):
        path.write_text("precious")
        before = everything(path.parents[1])
        assert main(command) == 1
        assert "notes.txt lies in" in capsys.readouterr().err
        assert everything(path.parents[1]) == before
        path.unlink()
        assert main(command) == 0


def take_over(result: Path) -> None:
    """What another host does that takes this one for dead: its lock file has the name."""
    file = ResultPaths.at(result).lock
    words = {"host": OTHER.host, "process": OTHER.process, "kernel": OTHER.kernel, "token": OTHER.token}
    file.with_name("theirs").write_text(json.dumps(words))
    file.with_name("theirs").rename(file)


def whole_files(state: Path) -> set[str]:
    """The names in a folder of job state and in its journal; what is just being written is not there yet."""
    return {path.name for path in (*state.iterdir(), *state.glob("finished/*")) if path.suffix != ".partial"}


@pytest.mark.parametrize("kind", ["staged", "merged", "written"])
@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_run_that_has_lost_its_lock_ends_and_leaves_everything(
    client: Client, dataset: Path, result: Path, kind: str, partials: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=7, partials=partials)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, "written", 3)
    state = ResultPaths.at(result).state
    recorder, before = Recorder([]), []

    def lose() -> None:
        take_over(result)
        before.append(whole_files(state))

    with pytest.raises(LockedError, match="the lock of this run was lost to process 17 on host elsewhere"):
        oocattn.resume(result, client=client, callbacks=[recorder, at_first(kind, lose)])
    assert not result.exists()
    assert {"plan.json", "lock", "finished", "partials"} <= {path.name for path in state.iterdir()}
    assert before[0] <= whole_files(state)
    os.utime(state / "lock", ns=(1, 1))  # theirs has died too
    monkeypatch.setattr(lock, "BEAT", 0.1)
    assert_same_bits(oocattn.resume(result, engine="inline"), right)


def test_an_error_while_tidying_up_is_no_failure(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(
            "oocattn.storage.results.growing.remove_journal", lambda state: None if not result.exists() else refuse()
        )
        found = carry_out(plan_for(dataset, chunks=7), dataset, result)
    assert "is complete, but not everything beside it was removed: [Errno 5] Input/output error" in caplog.text
    assert oocattn.status(result).state == "finished"
    assert oocattn.resume(result).path == found.path
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == BESIDE


PLANTED = ["lock", "plan.json", "status.json", "report.json", "partials", "finished", "GROWING", "GROWING/out/zarr.json"]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_planted_links_fifos_and_folders_end_a_command_or_are_replaced(
    dataset: Path, result: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(plan_for(dataset, chunks=7), dataset, result, "written", 3)
    paths = ResultPaths.at(result)
    victim = result.with_name("victim")
    target = paths.state / name.replace("GROWING", paths.unfinished.name)
    (shutil.rmtree if target.is_dir() else Path.unlink)(target) if target.exists() else None
    if kind == "link":
        victim.mkdir()
        (victim / "thesis.txt").write_text("precious")
        file = victim / "thesis.txt"
        target.symlink_to(victim if name in ("partials", "finished", "GROWING") else file)
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.mkdir()
    for command in (["status"], ["resume", "--engine", "inline"], ["verify"]):
        assert main([*command, str(result)]) in (0, 1)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
    if kind == "link":
        assert everything(victim) == {victim / "thesis.txt": b"precious"}


def test_what_was_computed_is_not_discarded_by_whoever_lost_the_lock(dataset: Path, result: Path) -> None:
    """The dataset has changed, so that the run would discard what it has done; but that is another's by now."""
    chunk = dataset / "q/c/0/0/0/0"

    def change() -> None:
        take_over(result)
        content = chunk.read_bytes()
        chunk.write_bytes(bytes(len(content)))

    plan = plan_for(dataset, chunks=7)
    with pytest.raises((LockedError, IntegrityError)):
        carry_out(plan, dataset, result, callbacks=[at_first("attended", change)])
    state = ResultPaths.at(result).state
    assert {"plan.json", "lock", "finished", "partials"} <= {path.name for path in state.iterdir()}


def test_an_unfinished_run_may_be_given_up(dataset: Path, result: Path) -> None:
    with pytest.raises(EnoughError):
        carry_out(plan_for(dataset), dataset, result, callbacks=[interrupt("staged", 1)])
    shutil.rmtree(ResultPaths.at(result).state)
    found = carry_out(plan_for(dataset, causal=True), dataset, result)
    assert np.isfinite(bits(found)[1].view(np.float32)).all()
    assert isinstance(zarr.open_group(result, mode="r")["out"], zarr.Array)
