"""What a run leaves on disk so that it can be resumed: what it works at, and the query chunks that it has finished.

`RESULT.oocattn/plan.json` is written before the first task, and `RESULT.oocattn/finished/HEADGROUP-CHUNK.json` once `out`
and `lse` of a chunk are on disk, before its partials are removed. All are records with a checksum, written durably. A record
of a chunk carries the identity of its run: one of another run, or a damaged one, counts for nothing, and the chunk is
computed again. What plan and records say is the caller's business.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oocattn.errors import IntegrityError
from oocattn.storage.durable import encode_record, read_record, sync, write_record

Place = tuple[int, int]
"""A head group and one of its query chunks."""


@dataclass(frozen=True)
class Journal:
    """The journal of the run `run`, an identity of everything that determines its result, in the folder `state`."""

    state: Path
    run: str

    @classmethod
    def begin(cls, state: Path, header: Mapping[str, Any]) -> Journal:
        """A new journal of the run that `header` describes; none may be there."""
        journal = cls(state, identity(header))
        journal._folder.mkdir()
        write_record(state / "plan.json", header)
        return journal

    @property
    def _folder(self) -> Path:
        return self.state / "finished"

    def finish(self, head_group: int, chunk: int, record: Mapping[str, Any]) -> None:
        """Record a query chunk that is on disk."""
        write_record(self._folder / f"{head_group}-{chunk}.json", {"run": self.run, **record})

    @property
    def records(self) -> int:
        """How many records there are, damaged ones and those of other runs among them."""
        return sum(1 for _ in self._folder.glob("*-*.json"))

    def finished(self) -> dict[Place, dict[str, Any]]:
        """The records of the finished chunks of this run; those that are damaged or another run's are left out."""
        found = {}
        for path in self._folder.glob("*-*.json"):
            try:
                head_group, chunk = map(int, path.stem.split("-"))
                record = read_record(path)
            except (ValueError, IntegrityError, OSError):
                continue
            if record.pop("run", None) == self.run:
                found[head_group, chunk] = record
        return found


def read_header(state: Path) -> dict[str, Any] | None:
    """What the unfinished run in the folder `state` works at, None where there is none. Raises IntegrityError if damaged."""
    try:
        return read_record(state / "plan.json")
    except FileNotFoundError:
        return None


def has_begun(state: Path) -> bool:
    """Whether there is the journal of a run in a folder."""
    return (state / "plan.json").exists()


def forget(state: Path) -> None:
    """Remove the journal in a folder, if there is one: what it says goes first, so that half of it is never believed."""
    if has_begun(state):
        (state / "plan.json").unlink()
        sync(state)
    shutil.rmtree(state / "finished", ignore_errors=True)


def identity(header: Mapping[str, Any]) -> str:
    """A digest of what a run works at."""
    return hashlib.sha256(encode_record(header)).hexdigest()[:32]
