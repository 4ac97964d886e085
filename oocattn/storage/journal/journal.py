"""The journal of a run: its plan, and the query chunks it has finished.

`RESULT.oocattn/plan.json` is written before the first task, and `RESULT.oocattn/finished/HEADGROUP-CHUNK.json` once
`out` and `lse` of a chunk are on disk, before its partials are removed. A record of another run, or a damaged one,
counts for nothing, and the chunk is computed again. What plan and records say is the caller's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oocattn.errors import IntegrityError
from oocattn.naming import setting
from oocattn.storage.files.durable import encode_record, read_record, sync, write_record
from oocattn.storage.files.folders import JOURNAL, names_in, remove_ours
from oocattn.storage.files.operations import name_failure, shows_damage
from oocattn.storage.journal.claims import Claim
from oocattn.text import printable

if TYPE_CHECKING:
    from oocattn.storage.remote.mirror import Mirror

HEADER, OTHER_BITS = "plan.json", "other-bits.json"

ChunkId = tuple[int, int]
"""A head group and one of its query chunks."""


@dataclass(frozen=True)
class Journal:
    """The journal of the run `run`, an identity, in the folder `state`. It is written under a `claim` to the result.

    Each file is passed to the `mirror` of the folder.
    """

    state: Path
    run: str
    claim: Claim | None = None
    mirror: Mirror | None = None

    @classmethod
    def begin(cls, state: Path, header: Mapping[str, Any], claim: Claim, mirror: Mirror | None = None) -> Journal:
        """A new journal of the run that `header` describes; none may be there."""
        journal = cls(state, identity(header), claim, mirror)
        with name_failure("make", journal._folder):
            journal._folder.mkdir()
        claim.check()
        journal._write(state / HEADER, header)
        return journal

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        write_record(path, record)
        if self.mirror is not None:
            self.mirror.push(path)

    @property
    def _folder(self) -> Path:
        return self.state / "finished"

    def finish(self, head_group: int, chunk: int, record: Mapping[str, Any]) -> None:
        """Record a query chunk that is on disk. Raises LockedError where the run has lost its lock."""
        if self.claim is None:
            raise ValueError("the journal was opened to be read: expected one under a lock")
        self.claim.check()
        self._write(self._folder / f"{head_group}-{chunk}.json", {"run": self.run, **record})

    def note_other_bits(self, words: str) -> None:
        """Record that from here on something else computes than when the run began."""
        if self.claim is not None:
            self.claim.check()
        self._write(self.state / OTHER_BITS, {"run": self.run, "words": words})

    @property
    def other_bits(self) -> str:
        """What computed otherwise for a part of the run than at its beginning, or ""."""
        with suppress(FileNotFoundError, IntegrityError):
            record = read_record(self.state / OTHER_BITS)
            if record.get("run") == self.run:
                return printable(record.get("words", ""))
        return ""

    @property
    def records(self) -> int:
        """How many records there are, damaged ones and those of other runs among them."""
        return len(self._names())

    def finished(self) -> dict[ChunkId, dict[str, Any]]:
        """The whole records of this run's finished chunks. Raises OSError where it is not known which are whole."""
        found = {}
        for name in self._names():
            try:
                head_group, chunk = map(int, name.removesuffix(".json").split("-"))
                record = read_record(self._folder / name)
            except (FileNotFoundError, ValueError):  # removed in between, or not a name of ours
                continue
            except (IntegrityError, OSError) as error:
                if not shows_damage(error):
                    raise
                continue
            if record.pop("run", None) == self.run:
                found[head_group, chunk] = record
        return found

    def _names(self) -> list[str]:
        return [name for name in names_in(self._folder) if "-" in name and name.endswith(".json")]


def read_header(state: Path) -> dict[str, Any] | None:
    """Read the header of the unfinished run in `state`; None if there is none. Raises IntegrityError for a damaged one."""
    try:
        return read_record(state / HEADER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IntegrityError as error:
        raise IntegrityError(
            f"{error}, so the unfinished run cannot be resumed: begin again with {setting('overwrite', True)}"
        ) from error


def remove_journal(state: Path) -> None:
    """Remove the journal in a folder, the header first: half of a journal is never believed."""
    for name in (HEADER, OTHER_BITS):
        with suppress(FileNotFoundError), name_failure("remove", state / name):
            (state / name).unlink()
            sync(state)
    remove_ours(state / "finished", JOURNAL)


def identity(header: Mapping[str, Any]) -> str:
    """A digest of what a run works at."""
    return hashlib.sha256(encode_record(header)).hexdigest()[:32]
