"""File systems that lack an operation, or fail at it: the work is done all the same, or one line says what failed.

What fails is said with the operation and the path, and no result or input is called damaged because of it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusing import ANSWERS, CALLS, refusing
from safetensors.torch import save_file
from support import BESIDE, Recorder, assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, OocattnError, Result, TaskError
from oocattn.pipelines import failing
from oocattn.storage.files import operations
from oocattn.storage.files.folders import UNKNOWN_DISK, free_disk
from oocattn.storage.files.operations import words_of
from oocattn.storage.journal import lock
from oocattn.storage.make.importing import import_arrays
from oocattn.storage.make.synth import synthesise

LACKING = {
    "sync": errno.EINVAL,
    "lock": errno.ENOLCK,
    "rename to a new name": errno.EINVAL,
    "link": errno.EPERM,
    "extend": errno.EINVAL,
    "advise": errno.ESPIPE,
    "touch": errno.EPERM,
    "map": errno.ENODEV,
}
"""What a file system may do without, all at once, and what it answers then."""

HARD = ("open", "look", "list", "make a folder", "rename", "remove", "read", "write", "sync")
"""What it must be able to do."""

ARRAYS = normal_arrays(64)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, and with nobody waiting long."""
    monkeypatch.setattr(operations, "_said", set())
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(failing, "PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture(scope="module")
def good(shared_path: Path) -> Result:
    """A result of the arrays of the `dataset` fixture, for comparison and to be verified."""
    dataset = write_dataset(shared_path / "dataset.zarr", ARRAYS, chunk_rows=16)
    return carry_out(plan_for(dataset, chunks=3), dataset, shared_path / "good.zarr")


def interrupt(dataset: Path, result: Path) -> None:
    """A run that ends with its first chunk written."""

    def stop(event: Event) -> None:
        if event.kind == "written":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan_for(dataset, chunks=3), dataset, result, callbacks=[stop])


def test_a_run_goes_on_where_a_file_system_lacks_much(
    dataset: Path, good: Result, result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as refused, caplog.at_level(logging.WARNING):
        seen = {name: refused.enter_context(refusing(result.parent, name, LACKING[name])) for name in LACKING}
        interrupt(dataset, result)
        assert oocattn.status(result).state == "interrupted"
        found = oocattn.resume(result, engine="inline")
        assert_same_bits(found, good)
        carry_out(plan_for(dataset, chunks=3, causal=True), dataset, result, overwrite=True)
        assert oocattn.verify(result, rows=4).passed
        synthesise(result.with_name("s.zarr"), tokens=64, heads=2, head_dim=8, dtype="float32")
    assert all(seen[name] for name in ("sync", "lock", "rename to a new name", "link", "extend", "map"))
    said = [record.getMessage() for record in caplog.records]
    assert len([words for words in said if words.startswith(str(result.parent)) and "does not sync folders" in words]) == 1
    assert len([words for words in said if "does not sync" in words]) == 1
    assert len([words for words in said if "has no locks" in words]) == 1
    assert not any("damaged" in words for words in said)


@pytest.mark.parametrize("name", [name for name in ANSWERS if name not in HARD])
def test_each_operation_can_be_done_without(dataset: Path, result: Path, name: str) -> None:
    for number in ANSWERS[name]:
        if number != errno.EIO:
            place = result.with_name(f"{number}.zarr")
            with refusing(result.parent, name, number):
                carry_out(plan_for(dataset, chunks=3), dataset, place)
                assert oocattn.verify(place, rows=2).passed


Prepare, Do = Callable[[Path], object], Callable[[Path], object]


def tensors(folder: Path) -> None:
    """The same three in every format."""
    for name, array in zip("qkv", ARRAYS, strict=True):
        np.save(folder / f"{name}.npy", array)
    torch.save({name: torch.from_numpy(array) for name, array in zip("qkv", ARRAYS, strict=True)}, folder / "qkv.pt")
    save_file({name: torch.from_numpy(array) for name, array in zip("qkv", ARRAYS, strict=True)}, folder / "qkv.safetensors")


def importing(*files: str) -> Do:
    def do(folder: Path) -> None:
        import_arrays(folder / "i.zarr", **{name: folder / file for name, file in zip("qkv", files, strict=True)})

    return do


def synth(folder: Path) -> None:
    synthesise(folder / "s.zarr", tokens=64, heads=2, head_dim=8, dtype="float32")


@pytest.fixture(params=["synth", "npy", "safetensors", "pt", "verify", "status", "run", "resume"])
def command(request: pytest.FixtureRequest, good: Result) -> tuple[str, Prepare, Do]:
    """A command: what it needs in a folder, and what it does there."""

    def copied(folder: Path) -> None:
        shutil.copytree(good.path, folder / "r.zarr")

    def interrupted(folder: Path) -> None:
        interrupt(write_dataset(folder / "d.zarr", ARRAYS, chunk_rows=16), folder / "r.zarr")

    commands: dict[str, tuple[Prepare, Do]] = {
        "synth": (lambda folder: None, synth),
        "npy": (tensors, importing("q.npy", "k.npy", "v.npy")),
        "safetensors": (tensors, importing(*3 * ["qkv.safetensors"])),
        "pt": (tensors, importing(*3 * ["qkv.pt"])),
        "verify": (copied, lambda folder: oocattn.verify(folder / "r.zarr", rows=2)),
        "status": (interrupted, lambda folder: oocattn.status(folder / "r.zarr")),
        "run": (
            lambda folder: write_dataset(folder / "d.zarr", ARRAYS, chunk_rows=16),
            lambda folder: carry_out(plan_for(folder / "d.zarr", chunks=3), folder / "d.zarr", folder / "r.zarr"),
        ),
        "resume": (interrupted, lambda folder: oocattn.resume(folder / "r.zarr", engine="inline")),
    }
    return request.param, *commands[request.param]


def outcome(do: Do, folder: Path) -> Any:
    """What comes of a command: what it returns, or the error that ends it in one line."""
    try:
        return do(folder)
    except (OocattnError, OSError) as error:
        return error


def check_outcome(folder: Path, found: Any) -> None:
    """It is a result, or one line that says what failed, on which path."""
    if isinstance(found, Exception):
        words = words_of(found)
        assert str(folder) in words
        assert "[Errno" not in words
        assert "damaged" not in words
        assert isinstance(found, OocattnError) or words.startswith("cannot ") or "no space left" in words
    else:
        assert getattr(found, "passed", True)


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # which zarr leaves when one of several fails
@pytest.mark.parametrize("name", HARD)
def test_what_fails_is_named(command: tuple[str, Prepare, Do], fast_path: Path, name: str) -> None:
    kind, prepare, do = command
    slow = kind in ("run", "resume", "status")
    for turn, number in enumerate(ANSWERS[name][:1] if slow else ANSWERS[name]):
        for after in (0, 5) if slow else (0, 1, 3, 8):
            folder = fast_path / f"{turn}-{after}"
            folder.mkdir()
            prepare(folder)
            with refusing(folder, name, number, after):
                found = outcome(do, folder)
            check_outcome(folder, found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("name", list(CALLS))
def test_what_fails_at_any_moment_is_named(command: tuple[str, Prepare, Do], fast_path: Path, name: str) -> None:
    _, prepare, do = command
    for number in ANSWERS[name]:
        for after, times in ((0, 1), (2, 1), (0, 1 << 30), (4, 1 << 30), (11, 1 << 30), (25, 1 << 30)):
            folder = fast_path / f"{number}-{after}-{times}"
            folder.mkdir()
            prepare(folder)
            with refusing(folder, name, number, after, times) as seen:
                found = outcome(do, folder)
            check_outcome(folder, found)
            if len(seen) <= after:
                break


def test_a_chunk_that_cannot_be_read_is_no_evidence_of_damage(good: Result) -> None:
    with (
        refusing(good.path / "out/c.0.0.0.0", "open", errno.EIO),
        pytest.raises(OSError, match=r"cannot open .*good.zarr/out/c\.0\.0\.0\.0: Input/output error; the disk"),
    ):
        oocattn.verify(good.path, rows=4)
    assert oocattn.verify(good.path, rows=4).passed


def test_a_finished_chunk_that_cannot_be_read_is_computed_again(
    dataset: Path, good: Result, result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(dataset, result)
    growing = next(result.with_name("result.zarr.oocattn").glob("result-*.zarr"))
    with refusing(growing / "out" / "c.", "read", errno.EIO, times=1):
        found = oocattn.resume(result, engine="inline")
    assert_same_bits(found, good)
    assert "is not known to be as it was written (cannot read" in caplog.text


@pytest.mark.parametrize(("folder", "name"), [("partials", "partial-"), ("finished", "0-"), ("out", "c.")])
def test_what_cannot_be_read_for_a_moment_is_neither_damaged_nor_removed(
    dataset: Path, good: Result, result: Path, folder: str, name: str
) -> None:
    interrupt(dataset, result)
    state = result.with_name("result.zarr.oocattn")
    within = next(state.glob("result-*.zarr")) / folder if folder == "out" else state / folder
    before, finished = sorted(os.listdir(within)), len(os.listdir(state / "finished"))
    assert before
    with refusing(within / name, "open", errno.ESTALE), pytest.raises((OSError, TaskError), match="Stale file handle"):
        oocattn.resume(result, engine="inline")
    assert sorted(os.listdir(within)) == before
    found = oocattn.resume(result, engine="inline", check_finished=True)
    assert_same_bits(found, good)
    assert (found.report.recomputed, found.report.chunks_before, found.report.chunks_compared) == (0, finished, finished)


class OtherNumbers:
    """The status of a file on a file system that has no numbers for files, or others each time."""

    counted = 0

    def __init__(self, status: os.stat_result, stable: bool) -> None:
        self._status = status
        OtherNumbers.counted += 1
        self.st_ino = 0 if stable else OtherNumbers.counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._status, name)


def numbered(real: Callable[..., os.stat_result], stable: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return OtherNumbers(real(*arguments, **options), stable)

    return call


@pytest.mark.parametrize("stable", [True, False], ids=["0", "another each time"])
def test_files_need_no_numbers(
    dataset: Path, good: Result, result: Path, monkeypatch: pytest.MonkeyPatch, stable: bool
) -> None:
    with monkeypatch.context() as patched:
        for name in ("stat", "lstat", "fstat"):
            patched.setattr(os, name, numbered(getattr(os, name), stable))
        interrupt(dataset, result)
        (result.with_name("result.zarr.oocattn") / "lock").write_text("left by a run that was killed")
        assert_same_bits(oocattn.resume(result, engine="inline"), good)
        assert oocattn.verify(result, rows=4).passed
        found = carry_out(plan_for(dataset, chunks=3, causal=True), dataset, result, overwrite=True)
        assert oocattn.verify(found.path, rows=4).passed
    beside = {path.name for path in result.with_name("result.zarr.oocattn").iterdir()}
    assert beside == {*BESIDE, "certificate.html", "certificate.json"}


def test_a_file_system_that_counts_nothing_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_disk(tmp_path / "not" / "there") < UNKNOWN_DISK
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 0, "free": 0}))
    assert free_disk(tmp_path) == UNKNOWN_DISK

    def refuse(_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("shutil.disk_usage", refuse)
    assert free_disk(tmp_path) == UNKNOWN_DISK


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "Disk quota exceeded; the quota of its user is used up: make room, then resume"),
        (errno.ENOSPC, "no space left for the result and its partials; make room and resume$"),
    ],
)
def test_no_room_ends_a_run_at_once(dataset: Path, result: Path, number: int, remedy: str) -> None:
    recorder = Recorder([])
    with refusing(result.parent, "write", number, after=4):
        error = outcome(lambda _: carry_out(plan_for(dataset, chunks=3), dataset, result, callbacks=[recorder]), result)
    assert isinstance(error, OSError)
    assert error.errno == number
    assert re.search(remedy, words_of(error))
    assert not recorder.of("recovered")
    assert carry_out(plan_for(dataset, chunks=3), dataset, result).path == result
