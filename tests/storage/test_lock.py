"""A lock is held by one, tells who it is, and is gone with its holder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import oocattn
from oocattn import LockedError
from oocattn.storage.lock import Holder, Lock, lock_holder

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
        assert lock_holder(path) == Holder(socket.gethostname(), os.getpid())
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
def test_it_lives_as_long_as_its_process(tmp_path: Path, killed: bool) -> None:
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout.readline() == b"held\n"
    assert lock_holder(path) == Holder(socket.gethostname(), holder.pid)
    with pytest.raises(LockedError, match=f"process {holder.pid} "):
        Lock(path)
    if killed:
        holder.kill()
    holder.communicate()
    assert lock_holder(path) is None
    with Lock(path):
        assert lock_holder(path) == Holder(socket.gethostname(), os.getpid())


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"host": "a"}', '{"host": "a", "process": "b"}'])
def test_the_text_of_a_lock_is_not_believed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock"
    path.write_text(text)
    assert lock_holder(path) is None  # whatever it says, nobody holds it
    with Lock(path):
        path.write_text(text)
        assert lock_holder(path) == Holder("unknown", 0)
        with pytest.raises(LockedError, match="process 0 on host unknown"):
            Lock(path)


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

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(taken) > 4
