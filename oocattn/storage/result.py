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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.errors import ContainsArrayError
from zarr.storage import LocalStore

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.storage.checksums import ATTRIBUTE as CHECKSUMS
from oocattn.storage.checksums import Checksums, as_digits, checksum
from oocattn.storage.create import (
    chunk_bytes,
    chunk_file,
    create_array,
    move_into_place,
    numpy_dtype,
    sync_metadata,
    write_chunk,
)
from oocattn.storage.durable import PARTIAL, make_durably, remove_leftovers, sync, write_text
from oocattn.storage.journal import forget, has_begun
from oocattn.storage.locations import local_path
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
        return _recorded(self.result) if os.path.lexists(self.result) else None

    def begin(
        self, *, shape: tuple[int, int, int, int], dtype: str, chunk_rows: int, attributes: Mapping[str, Any]
    ) -> ResultArrays:
        """Make the empty result, `out` [B, Hq, N, D] and `lse` [B, Hq, N], in place of any that an earlier run left.

        Raises ProblemError where it could not be given its name later.
        """
        make_durably(self.state)
        if self.state.stat().st_dev != self.result.parent.stat().st_dev:
            raise ProblemError(
                f"{self.state} is on another file system than {self.result.parent}: what grows there cannot be moved to its "
                "place; choose another path"
            )
        forget(self.state)
        self._restore()
        self._throw_away(*self.state.glob("result-*.zarr"), self.scratch)
        self.status.unlink(missing_ok=True)
        self._forget_certificate()
        self.scratch.mkdir()
        growing = self.state / f"result-{uuid.uuid4().hex[:8]}.zarr"
        group = zarr.create_group(LocalStore(growing), attributes={ATTRIBUTES: dict(attributes)}, zarr_format=3)
        out = create_array(group, "out", shape, dtype, chunk_rows)
        arrays = ResultArrays(out, create_array(group, "lse", shape[:3], "float32", chunk_rows))
        sync_metadata(self.growing)
        return arrays

    def resume(
        self, *, shape: tuple[int, int, int, int], dtype: str, chunk_rows: int, attributes: Mapping[str, Any]
    ) -> ResultArrays:
        """The result that has begun to grow, to be written on.

        Raises IntegrityError where it is not what `begin` made of the same arguments.
        """
        self.scratch.mkdir(exist_ok=True)
        arrays = ResultArrays.of(LocalStore(self.growing), "r+")
        found = {name: (array.shape, array.dtype, array.chunks) for name, array in arrays.by_name.items()}
        out, lse = (1, 1, chunk_rows, shape[3]), (1, 1, chunk_rows)
        expected = {"out": (shape, numpy_dtype(dtype), out), "lse": (shape[:3], np.dtype(np.float32), lse)}
        recorded = _recorded(self.growing)
        if found != expected or any(recorded.get(name) != value for name, value in attributes.items()):
            raise IntegrityError(
                f"{self.growing}: the metadata of the unfinished result is damaged: begin anew with overwrite=True "
                "(--overwrite)"
            )
        return arrays

    def commit(self) -> None:
        """Give the complete result its name and leave nothing but the report beside it."""
        remove_leftovers(self.growing)
        found = self.attributes()
        if found is not None and "problem" not in found:
            raise ResultExistsError(
                f"{self.result} has appeared while the run was under way, and is not a result of oocattn: move it away and "
                "resume"
            )
        self._forget_certificate()  # of the result that is replaced, if it was verified meanwhile
        move_into_place(self.growing, self.result, self.replaced)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a run whose result is complete needs no more: all but the report and a certificate."""
        forget(self.state)
        self._throw_away(self.scratch, self.replaced)
        self.status.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what a run has done, for it cannot be trusted."""
        self._restore()
        self.tidy()
        self._throw_away(self.growing)

    def _restore(self) -> None:
        """Give a result its name back that was to be replaced when a run was killed, where nothing took its place."""
        if self.replaced.exists() and not os.path.lexists(self.result):
            os.rename(self.replaced, self.result)
            sync(self.result.parent)

    def _throw_away(self, *folders: Path) -> None:
        """Remove folders; first their names, so that whoever still writes there finds them no more."""
        for folder in folders:
            with suppress(FileNotFoundError):
                os.rename(folder, self.state / f"trash-{uuid.uuid4().hex[:8]}")
        for trash in self.state.glob("trash-*"):
            shutil.rmtree(trash, ignore_errors=True)

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
        leftovers = (self.scratch, self.replaced, self.status, self.lock, *self.state.glob("trash-*"))
        return not self.growing.exists() and (has_begun(self.state) or any(path.exists() for path in leftovers))


def _recorded(path: Path) -> dict[str, Any]:
    """What the result group at `path` is the answer to; nothing where there is no such group."""
    with _naming_damage(path):
        try:
            found = zarr.open_group(LocalStore(path), mode="r").attrs.get(ATTRIBUTES)
        except (FileNotFoundError, NotADirectoryError, ContainsArrayError):
            found = None
        return dict(found) if isinstance(found, Mapping) else {}


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Zarr's many errors for metadata that is damaged become one, which names the group."""
    try:
        yield
    except Exception as error:
        raise IntegrityError(f"{path}: no group that Zarr can open ({error}): it is damaged") from error


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
        with _naming_damage(store.root):
            group = zarr.open_group(store, mode=mode)
            out, lse = group.get("out"), group.get("lse")
        if not (isinstance(out, zarr.Array) and isinstance(lse, zarr.Array)):
            raise IntegrityError(
                f"{store.root}: no finished result here: expected the arrays out and lse, found {sorted(group.keys())}"
            )
        return cls(out, lse)

    def has(self, batch: int, head: int, part: int) -> bool:
        """Whether chunk `part` of one head is there, as long as it must be."""
        for array in (self.out, self.lse):
            path = chunk_file(array, (batch, head, part, *(0 for _ in array.shape[3:])))
            if not path.is_file() or path.stat().st_size != chunk_bytes(array):
                return False
        return True

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
