"""File systems without locks, or with other habits: a file that is touched keeps others away."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from oocattn import LockedError
from oocattn.storage.files import operations
from oocattn.storage.journal import lock as lock_module
from oocattn.storage.journal.claims import Holder
from oocattn.storage.journal.lock import FileLock, lock_holder


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that gives no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(operations, "_said", set())
    monkeypatch.setattr(lock_module, "BEAT", 0.1)


@pytest.mark.usefixtures("lockless")
def test_without_flock_a_touched_file_keeps_others_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    with FileLock(path) as held:
        assert lock_holder(path) == Holder.this_process()
        for _ in range(2):
            with pytest.raises(LockedError, match=rf"process {os.getpid()} on host"):
                FileLock(path)
        assert held.is_held()
    assert lock_holder(path) is None
    assert list(tmp_path.iterdir()) == []
    assert caplog.text.count("this file system has no locks (flock); other runs are kept away by a file") == 1


@pytest.mark.usefixtures("lockless")
def test_without_flock_a_stale_lock_is_watched_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), process=17))))
    began = time.monotonic()
    with FileLock(path) as held:
        assert time.monotonic() - began >= 0.3
        assert held.is_held()
    assert "the stale lock of process 17" in caplog.text


def test_a_holder_with_the_kernels_lock_respects_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the lock daemon of a network file system is away for a moment."""
    monkeypatch.setattr(lock_module, "BEAT", 0.1)
    real, answers = fcntl.flock, iter([OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))])

    def refuse_once(*arguments: int) -> None:
        for error in answers:
            raise error
        real(*arguments)

    monkeypatch.setattr("fcntl.flock", refuse_once)
    with FileLock(tmp_path / "lock") as held:
        assert lock_holder(tmp_path / "lock") == Holder.this_process()
        with pytest.raises(LockedError):
            FileLock(tmp_path / "lock")
        assert held.is_held()


@pytest.mark.usefixtures("lockless")
@pytest.mark.parametrize("refused", [True, False], ids=["refused", "ignored"])
def test_a_file_whose_time_cannot_be_set_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    def utime(*_: object) -> None:
        if refused:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.utime", utime)
    with FileLock(tmp_path / "lock") as held:
        with pytest.raises(LockedError):
            FileLock(tmp_path / "lock")
        assert held.is_held()


@pytest.mark.usefixtures("lockless")
def test_a_lock_of_an_older_version_is_respected(tmp_path: Path) -> None:
    path, ended = tmp_path / "lock", threading.Event()
    older = asdict(replace(Holder.this_process(), process=17))
    del older["flocked"]
    path.write_text(json.dumps(older))

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LockedError, match="process 17"):
            FileLock(path)
    finally:
        ended.set()
        beating.join()
