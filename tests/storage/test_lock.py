"""A lock is held by one, tells who it is, and is gone with its holder."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import oocattn
from oocattn import LockedError, TimeLimitError
from oocattn.storage import lock as lock_module
from oocattn.storage.lock import NOBODY, Holder, Lock, lock_holder

HOLD = """
import sys
from pathlib import Path
from oocattn.storage.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_excludes_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with Lock(path):
        assert lock_holder(path) == Holder.this_process()
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on host {socket.gethostname()}; wait for it to end"):
            Lock(path)
        assert lock_holder(path) is not None
    assert lock_holder(path) is None
    assert not path.exists()
    with Lock(path):
        pass


def test_an_error_releases_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Lock(tmp_path / "lock"):
        raise KeyError
    assert lock_holder(tmp_path / "lock") is None


@pytest.mark.parametrize("killed", [False, True])
def test_it_lives_as_long_as_its_process(tmp_path: Path, killed: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout.readline() == b"held\n"
    assert lock_holder(path) == replace(Holder.this_process(), process=holder.pid)
    with pytest.raises(LockedError, match=f"process {holder.pid} "):
        Lock(path)
    if killed:
        holder.kill()
    holder.communicate()
    assert lock_holder(path) is None
    with caplog.at_level(logging.WARNING), Lock(path):
        assert lock_holder(path) == Holder.this_process()
    message = f"taking over from process {holder.pid} on host {socket.gethostname()}, which is gone"
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
            Lock(left)
    finally:
        ended.set()
        beating.join()
    assert json.loads(left.read_text()) == asdict(OTHER)


def test_one_that_has_fallen_silent_is_succeeded(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.utime(left, ns=(1, 1))
    assert lock_holder(left) is None
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), Lock(left):
        assert time.monotonic() - began >= 0.3
        assert "taking over from process 17 on host elsewhere, which is gone" in caplog.text
        touched = left.stat().st_mtime_ns
        time.sleep(0.4)
        assert left.stat().st_mtime_ns > touched  # this one beats, too


def test_nobody_watches_beyond_a_time_limit(left: Path) -> None:
    with pytest.raises(TimeLimitError, match="before it was known whether process 17 on host elsewhere is alive"):
        Lock(left, until=time.time() - 1)
    assert json.loads(left.read_text()) == asdict(OTHER)


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"host": "a"}', '{"host": "a", "process": "b"}'])
def test_the_text_of_a_lock_is_not_believed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT", 0.1)
    path = tmp_path / "lock"
    path.write_text(text)
    assert lock_holder(path) is None  # whatever it says, nobody holds it
    with Lock(path):
        path.write_text(text)
        assert lock_holder(path) == NOBODY
        with pytest.raises(LockedError, match="process 0 on host unknown"):
            Lock(path)


def test_one_that_was_succeeded_leaves_its_successor_alone(tmp_path: Path) -> None:
    """As where a file system forgets the lock of a host that slept."""
    path = tmp_path / "lock"
    with Lock(path):
        path.unlink()
        successor = Lock(path)
    assert lock_holder(path) == Holder.this_process()
    with successor:
        pass
    with Lock(path):
        path.write_text(json.dumps(asdict(OTHER)))  # in the same file
    assert json.loads(path.read_text()) == asdict(OTHER)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("fcntl.flock", refuse)
    for use in (Lock, lock_holder):
        with pytest.raises(OSError, match=r"gives no locks.*choose another path"):
            use(tmp_path / "lock")


def test_many_contenders_hold_it_one_at_a_time(tmp_path: Path) -> None:
    holders, most, taken = [], [], []
    guard = threading.Lock()

    def contend() -> None:
        for _ in range(200):
            try:
                with Lock(tmp_path / "lock"):
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
