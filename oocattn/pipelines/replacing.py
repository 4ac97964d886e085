"""What a result may not replace: the tensors that it is computed from, wherever both lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from zarr.storage import FsspecStore, LocalStore

from oocattn.errors import IntegrityError, RemoteError, ResultExistsError
from oocattn.storage.inputs.computed import ComputedSource
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.given_store import GivenStore
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.paths import ResultPaths, recorded_attributes
from oocattn.storage.remote.store import unwrapped_files
from oocattn.storage.zarr_compat import Store, unwrapped


@dataclass(frozen=True)
class _Place:
    """A path in what holds it: the files of this machine, a kind of server, or what a store of this process keeps."""

    holder: object
    path: str

    @classmethod
    def of_file(cls, path: Path) -> _Place:
        return cls(LocalFileSystem, path.resolve().as_posix().strip("/"))

    @classmethod
    def of_node(cls, store: Store, path: str) -> _Place:
        if isinstance(store, GivenStore):
            path = _join(store.prefix, path)
            store = store.given
        store = unwrapped(store)
        if isinstance(store, LocalStore):
            return cls.of_file(store.root / path)
        if isinstance(store, FsspecStore):
            files = unwrapped_files(store.fs)
            path = _join(store.path, path)
            return cls.of_file(Path(f"/{path}")) if isinstance(files, LocalFileSystem) else cls(type(files), path)
        return cls(_content_of(store), path.strip("/"))

    def overlaps(self, other: _Place) -> bool:
        """Whether one of them is the other, or lies in it."""
        ours, theirs = (f"{place.path}/".lstrip("/") for place in (self, other))
        return self.holder == other.holder and (ours.startswith(theirs) or theirs.startswith(ours))


def refuse_to_replace_dataset(paths: ResultPaths, dataset: Dataset) -> None:
    """Raise ResultExistsError where the result, or the folder of job state, would lie in the dataset or hold it."""
    locations = (dataset.location, *(origin.location for origin in dataset.origins.values()))
    # A group, and what archives lie in, are known by name alone.
    if paths.stored is not None and any(paths.stored.overlaps(name.rpartition("::")[2]) for name in locations if name):
        raise _belongs_error(paths.result, dataset)
    inputs = list(_places_of(dataset))
    for name, place in _written(paths):
        if any(place.overlaps(theirs) for theirs in inputs):
            raise _belongs_error(name, dataset)


def refuse_to_remove_what_is_computed_from(paths: ResultPaths, dataset: Dataset) -> None:
    """Raise ResultExistsError where tensors are computed as they are read, perhaps from what a run would remove first.

    A result in a store grows in place of the one that is there. A local one takes its place when the inputs were read.
    """
    computed = [name for name, source in dataset.arrays.items() if isinstance(source, ComputedSource)]
    if computed and paths.stored is not None and paths.stored.objects.list():
        raise ResultExistsError(
            f"{paths.result} exists, and {computed[0]} ({dataset.arrays[computed[0]].describe()}) may be computed from it, "
            "which would be removed first: choose another place, or remove it yourself"
        )


def refuse_within_result(paths: ResultPaths) -> None:
    """Raise ResultExistsError where the result would lie in another one, or in the job state beside one."""
    above = paths.folder.parents if paths.stored is None else paths.stored.above()
    for place in above:
        inside = f"{paths.result} lies in {place}"
        if str(place).endswith(".oocattn"):
            raise ResultExistsError(f"{inside}, the job state of a result: choose a place outside it")
        with suppress(IntegrityError, RemoteError):  # what cannot be read is no result that is used
            if recorded_attributes(place):
                raise ResultExistsError(f"{inside}, which is a result of oocattn: choose a place outside it")


def _belongs_error(name: object, dataset: Dataset) -> ResultExistsError:
    return ResultExistsError(f"{name} belongs to the dataset {dataset.location}: choose another place for the result")


def _written(paths: ResultPaths) -> Iterator[tuple[object, _Place]]:
    """The places that a run writes to, with their names."""
    if isinstance(paths.result, Path):
        yield paths.result, _Place.of_file(paths.result)
    else:
        place = _Place.of_node(paths.result.store, paths.result.path)
        yield paths.result, place
        if paths.beside is not None:
            yield paths.beside, _Place(place.holder, f"{place.path}.oocattn")
    yield paths.state, _Place.of_file(paths.state)


def _places_of(dataset: Dataset) -> Iterator[_Place]:
    """Where the tensors lie, as far as that is known."""
    for source in dataset.arrays.values():
        if source.path is not None:
            yield _Place.of_file(source.path)
        elif isinstance(source, ZarrSource):
            yield _Place.of_node(source.array.store, source.array.path)


def _content_of(store: Any) -> object:
    """What a store of this process keeps its objects in: the same for one that is opened again to be read."""
    content = getattr(store, "_store_dict", None)  # a MemoryStore's; equal ones may be two
    return id(content) if content is not None else getattr(store, "store", getattr(store, "_store", store))


def _join(*parts: str) -> str:
    return "/".join(part for part in (part.strip("/") for part in parts) if part)
