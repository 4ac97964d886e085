"""Lock files of other processes and hosts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from oocattn.storage.journal import lock as lock_module
from oocattn.storage.journal.claims import Holder

HOLD = """
import sys
from pathlib import Path
from oocattn.storage.journal.lock import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
OTHER = Holder("elsewhere", 17, "another kernel")


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a process on another host, whose lock is not seen here."""
    monkeypatch.setattr(lock_module, "BEAT", 0.1)
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(OTHER)))
    return path
