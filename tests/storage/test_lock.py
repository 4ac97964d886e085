"""A lock is held by one, tells who it is, and is gone with its holder."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import oocattn
from oocattn import IntegrityError, LockedError, TimeLimitError
from oocattn.storage.journal import lock as lock_module
from oocattn.storage.journal.claims import UNKNOWN_HOLDER, Holder
from oocattn.storage.journal.lock import FileLock, lock_holder

HOLD = """
import sys
from pathlib import Path
from oocattn.storage.journal.lock import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_excludes_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with FileLock(path):
        assert lock_holder(path) == Holder.this_process()
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on host {socket.gethostname()}; wait for it to end"):
            FileLock(path)
        assert lock_holder(path) is not None
    assert lock_holder(path) is None
    assert not path.exists()
    with FileLock(path):
        pass


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FileLock(tmp_path / "lock"):
        raise KeyError
    assert lock_holder(tmp_path / "lock") is None


@pytest.mark.parametrize("killed", [False, True])
def test_a_lock_lives_as_long_as_its_process(tmp_path: Path, killed: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout.readline() == b"held\n"
    assert lock_holder(path) == replace(Holder.this_process(), process=holder.pid)
    with pytest.raises(LockedError, match=f"process {holder.pid} "):
        FileLock(path)
    if killed:
        holder.kill()
    holder.communicate()
    assert lock_holder(path) is None
    with caplog.at_level(logging.WARNING), FileLock(path):
        assert lock_holder(path) == Holder.this_process()
    message = f"the stale lock of process {holder.pid} on host {socket.gethostname()} is taken over"
    assert (message in caplog.text) is killed


OTHER = Holder("elsewhere", 17, "another kernel")


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a process on another host, whose lock is not seen here."""
    monkeypatch.setattr(lock_module, "BEAT", 0.1)
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(OTHER)))
    return path


def test_a_holder_on_another_host_is_known_by_its_beats(left: Path) -> None:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(left)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        assert lock_holder(left) == OTHER
        with pytest.raises(LockedError, match="being written by process 17 on host elsewhere"):
            FileLock(left)
    finally:
        ended.set()
        beating.join()
    assert json.loads(left.read_text()) == asdict(OTHER)


def test_a_lock_whose_holder_has_fallen_silent_is_taken_over(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.utime(left, ns=(1, 1))
    assert lock_holder(left) is None
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), FileLock(left):
        assert time.monotonic() - began >= 0.3
        assert "the stale lock of process 17 on host elsewhere is taken over" in caplog.text
        touched = left.stat().st_mtime_ns
        time.sleep(0.4)
        assert left.stat().st_mtime_ns > touched  # this one beats, too


def test_a_stale_lock_is_not_watched_beyond_the_time_limit(left: Path) -> None:
    with pytest.raises(TimeLimitError, match="before it was known whether process 17 on host elsewhere is alive"):
        FileLock(left, until=time.time() - 1)
    assert json.loads(left.read_text()) == asdict(OTHER)


def test_a_lock_that_cannot_be_read_is_not_taken_for_left_behind(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(OSError, match=f"cannot read {left}: Input/output error"):
        lock_holder(left)


@pytest.mark.parametrize(
    "text", [b"", b"not JSON", b"[]", b'{"host": "a"}', b'{"host": "a", "process": "b"}', b"\xff\xfe", b"[" * 100_000]
)
def test_the_text_of_a_lock_is_not_believed(tmp_path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 0.05)
    path = tmp_path / "lock"
    path.write_bytes(text)
    assert lock_holder(path) is None  # whatever it says, nobody holds it
    began = time.monotonic()
    with FileLock(path):
        assert time.monotonic() - began < 0.4
        assert lock_holder(path) == Holder.this_process()
        path.write_bytes(text)
        assert lock_holder(path) == UNKNOWN_HOLDER
        with pytest.raises(LockedError, match="process 0 on host unknown"):
            FileLock(path)


def test_a_lock_that_cannot_be_read_is_not_taken_over(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(left))

    os.utime(left, ns=(1, 1))
    monkeypatch.setattr(lock_module, "read_file", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        FileLock(left)
    assert json.loads(left.read_text()) == asdict(OTHER)
    assert list(left.parent.glob("*.partial")) == []


def test_a_lock_that_is_released_touches_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a beat is under way, which would find the next file that is opened under its descriptor."""
    beating, other = threading.Event(), tmp_path / "other"
    other.touch()
    os.utime(other, ns=(1, 1))
    monkeypatch.setattr(lock_module, "BEAT", 0.01)
    held = FileLock(tmp_path / "lock")
    real = held.claim.holds

    def slowly() -> bool:
        found = real()
        if not beating.is_set():
            beating.set()
            time.sleep(0.2)
        return found

    monkeypatch.setattr(held, "is_held", slowly)
    beating.wait()
    held.release()
    with other.open("rb"):
        time.sleep(0.3)
    assert other.stat().st_mtime_ns == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.with_name("victim"))])
def test_a_lock_path_that_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "lock"
    (tmp_path / "victim").write_text("precious")
    make(path)
    for use in (FileLock, lock_holder):
        with pytest.raises(IntegrityError, match=r"lock is (no regular file|a folder|a symbolic link).*remove it"):
            use(path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_host_name_cannot_forge_a_line(tmp_path: Path) -> None:
    assert str(Holder("a\nfinished\x1b[2J", 1)) == r"process 1 on host a\nfinished\x1b[2J"


def test_a_holder_that_lost_its_lock_is_told_and_leaves_it_alone(tmp_path: Path) -> None:
    """As where a file system forgets the lock of a host that slept."""
    path = tmp_path / "lock"
    with FileLock(path) as loser:
        claim = pickle.loads(pickle.dumps(loser.claim))
        claim.check()
        assert loser.is_held()
        path.unlink()
        successor = FileLock(path)
        assert not loser.is_held()
        with pytest.raises(LockedError, match=r"the lock of this run was lost to process \d+ on host .*: this run ends"):
            claim.check()
    assert lock_holder(path) == Holder.this_process()
    with successor:
        successor.claim.check()
    assert not path.exists()
    with pytest.raises(LockedError, match="the lock of this run was removed or moved: this run ends"):
        successor.claim.check()


def test_two_hosts_that_do_not_see_each_other_are_told_apart_by_their_tokens(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may take over what a third one left: at the end one has it, and no other believes so."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    os.utime(left, ns=(1, 1))
    with ThreadPoolExecutor(4) as hosts:
        trying = [hosts.submit(FileLock, left) for _ in range(4)]
    locks = [future.result() for future in trying if not isinstance(future.exception(), LockedError)]
    assert sum(lock.is_held() for lock in locks) == 1
    for lock in locks:
        lock.release()
    assert not left.exists()


def test_a_lock_is_whole_from_its_first_moment(tmp_path: Path) -> None:
    """Whoever looks finds nothing, or who holds it: never a file without words."""
    path, ended, seen = tmp_path / "lock", threading.Event(), set[bytes]()

    def look() -> None:
        while not ended.is_set():
            with suppress(FileNotFoundError):
                seen.add(path.read_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(300):
        with FileLock(path):
            pass
    ended.set()
    looking.join()
    assert all(b'"token"' in text and text.endswith(b"}") for text in seen)
    assert [entry.name for entry in tmp_path.iterdir()] == []


def test_a_lock_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match=rf"cannot lock {tmp_path}/lock: Input/output error"):
        FileLock(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


def test_many_contenders_hold_it_one_at_a_time(tmp_path: Path) -> None:
    holders, most, taken = [], [], []
    guard = threading.Lock()

    def contend() -> None:
        for _ in range(200):
            try:
                with FileLock(tmp_path / "lock"):
                    holders.append(1)
                    most.append(len(holders))
                    holders.pop()
                    with guard:
                        taken.append(1)
            except LockedError:
                pass

    with ThreadPoolExecutor(4) as threads:
        ended = [threads.submit(contend) for _ in range(4)]
    assert [future.result() for future in ended] == [None] * 4
    assert set(most) == {1}
    assert len(taken) > 4


def test_a_fork_has_no_part_in_the_lock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path) as lock:
        process = os.fork()
        if process == 0:
            open_files = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
            lock.release()
            os._exit(bool(lock.is_held()) + 2 * (str(path) in open_files))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        lock.claim.check()
        assert lock_holder(path) == lock.holder
    assert not path.exists()
