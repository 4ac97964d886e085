"""Where a run's bytes lie: the result group, and the folder of job state beside it.

While it runs, everything is in `RESULT.oocattn/`: the growing result, the journal, scratch, the lock and the status. When it
is complete the result is renamed to `RESULT`, and only the report stays behind, beside which `verify` puts its certificate:
what lies at `RESULT` is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore

from oocattn.errors import IntegrityError, ProblemError
from oocattn.storage.checksums import ATTRIBUTE as CHECKSUMS
from oocattn.storage.checksums import Checksums, as_digits, checksum
from oocattn.storage.create import create_array, local_path, move_into_place, sync_metadata, write_chunk
from oocattn.storage.durable import PARTIAL, remove_leftovers, write_text
from oocattn.storage.journal import forget, has_begun
from oocattn.storage.mapped_store import MappedStore

ATTRIBUTES = "oocattn"
"""The one attribute of a result group: what it is the answer to."""


@dataclass(frozen=True)
class ResultPaths:
    """The places of one result."""

    result: Path

    @classmethod
    def at(cls, path: str | Path) -> ResultPaths:
        """The places of the result at `path`. Raises ProblemError for a URL: results are local."""
        local = local_path(path)
        if local is None:
            raise ProblemError(f"result {path}: results are written to a local path, not to a URL")
        return cls(local)

    @property
    def state(self) -> Path:
        """The folder of job state."""
        return self.result.with_name(self.result.name + ".oocattn")

    @property
    def growing(self) -> Path:
        """The result while it is not complete.

        Every run has another name for it: what is left of a run that is gone, such as a worker that nobody has told, finds
        its own no more and cannot write into that of the next.
        """
        return next(self.state.glob("result-*.zarr"), self.state / "result.zarr")

    @property
    def replaced(self) -> Path:
        """The result that another one takes the place of, for the moment in which it does."""
        return self.state / "replaced.zarr"

    @property
    def scratch(self) -> Path:
        """The folder of partials."""
        return self.state / "partials"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def status(self) -> Path:
        return self.state / "status.json"

    @property
    def report(self) -> Path:
        return self.state / "report.json"

    @property
    def certificate(self) -> Path:
        return self.state / "certificate.json"

    @property
    def certificate_page(self) -> Path:
        return self.state / "certificate.html"

    def attributes(self) -> dict[str, Any] | None:
        """What the complete result at this path is the answer to; None where there is none."""
        if not os.path.lexists(self.result):
            return None
        try:
            found = zarr.open_group(LocalStore(self.result), mode="r").attrs.get(ATTRIBUTES)
        except (FileNotFoundError, NotADirectoryError, ContainsArrayError):
            found = None
        return dict(found) if isinstance(found, Mapping) else {}

    def begin(
        self, *, shape: tuple[int, int, int, int], dtype: str, chunk_rows: int, attributes: Mapping[str, Any]
    ) -> ResultArrays:
        """Make the empty result, `out` [B, Hq, N, D] and `lse` [B, Hq, N], in place of any that an earlier run left."""
        forget(self.state)
        for leftover in (*self.state.glob("result-*.zarr"), self.scratch, self.replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        self.status.unlink(missing_ok=True)
        self._forget_certificate()
        self.scratch.mkdir(parents=True)
        growing = self.state / f"result-{uuid.uuid4().hex[:8]}.zarr"
        group = zarr.create_group(LocalStore(growing), attributes={ATTRIBUTES: dict(attributes)}, zarr_format=3)
        out = create_array(group, "out", shape, dtype, chunk_rows)
        arrays = ResultArrays(out, create_array(group, "lse", shape[:3], "float32", chunk_rows))
        sync_metadata(self.growing)
        return arrays

    def resume(self) -> ResultArrays:
        """The result that has begun to grow, to be written on; what killed writes left of files is removed."""
        self.scratch.mkdir(exist_ok=True)
        remove_leftovers(self.state)
        return ResultArrays.of(LocalStore(self.growing), "r+")

    def commit(self) -> None:
        """Give the complete result its name and leave nothing but the report beside it."""
        remove_leftovers(self.growing)
        self._forget_certificate()  # of the result that is replaced, if it was verified meanwhile
        move_into_place(self.growing, self.result, self.replaced)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a run whose result is complete needs no more: all but the report and a certificate."""
        forget(self.state)
        for leftover in (self.scratch, self.replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        self.status.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what a run has done, for it cannot be trusted."""
        self.tidy()
        shutil.rmtree(self.growing, ignore_errors=True)

    def _forget_certificate(self) -> None:
        for path in (self.certificate, self.certificate_page):
            path.unlink(missing_ok=True)

    @property
    def resumable(self) -> bool:
        """Whether a run has begun here whose result is not complete."""
        return self.growing.exists() and has_begun(self.state)

    @property
    def untidy(self) -> bool:
        """Whether a run was killed after it had committed its result and before it had tidied up."""
        leftovers = (self.state / "plan.json", self.scratch, self.replaced, self.status, self.lock)
        return not self.growing.exists() and any(path.exists() for path in leftovers)


@dataclass(frozen=True)
class Written:
    """What was written of a part: its bytes, and the checksums of its rows of `out` and `lse`."""

    nbytes: int
    out: str
    lse: str


class ResultArrays:
    """The arrays of a result; while it grows it is written chunk by chunk, each by one writer."""

    def __init__(self, out: zarr.Array[Any], lse: zarr.Array[Any]) -> None:
        self.out = out
        self.lse = lse

    @property
    def by_name(self) -> dict[str, zarr.Array[Any]]:
        return {"out": self.out, "lse": self.lse}

    @classmethod
    def open(cls, path: Path) -> ResultArrays:
        """The arrays of the result at `path`, read through memory maps. Raises IntegrityError where one is missing."""
        return cls.of(MappedStore(path, read_only=True), "r")

    @classmethod
    def of(cls, store: LocalStore, mode: Literal["r", "r+"]) -> ResultArrays:
        """The arrays of the result in a store. Raises IntegrityError where one is missing."""
        group = zarr.open_group(store, mode=mode)
        out, lse = group.get("out"), group.get("lse")
        if not (isinstance(out, zarr.Array) and isinstance(lse, zarr.Array)):
            raise IntegrityError(
                f"{store.root}: no finished result here: expected the arrays out and lse, found {sorted(group.keys())}"
            )
        return cls(out, lse)

    def write(self, batch: int, head: int, part: int, out: npt.NDArray[np.generic], lse: npt.NDArray[np.generic]) -> Written:
        """Write chunk `part` of one head, out [n, D] and lse [n]."""
        checksums = [as_digits(checksum(rows)) for rows in (out, lse)]  # of what is to be written, not of what was
        write_chunk(self.out, (batch, head, part, 0), out[np.newaxis, np.newaxis])
        write_chunk(self.lse, (batch, head, part), lse[np.newaxis, np.newaxis])
        return Written(out.nbytes + lse.nbytes, *checksums)

    def record(self, checksums: Mapping[str, Checksums]) -> None:
        """Keep the checksums of `out` and `lse` with the arrays; when this returns, they are on disk."""
        for name, array in self.by_name.items():
            assert isinstance(array.store, LocalStore)
            path = array.store.root / array.path / "zarr.json"
            metadata = json.loads(path.read_text())  # not through zarr, which does not sync what it writes
            metadata.setdefault("attributes", {})[CHECKSUMS] = checksums[name].to_json()
            write_text(path, json.dumps(metadata, indent=2))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file at once, so that readers see the old text or the new."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises IntegrityError for anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
