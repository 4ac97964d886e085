"""Arrays and groups of Zarr as callers name them: by path or URL, or as objects of Zarr over any store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import zarr
from zarr.storage import FsspecStore, LocalStore

from oocattn.errors import ProblemError
from oocattn.storage.inputs.direct import DirectReader
from oocattn.storage.inputs.given_store import GivenStore
from oocattn.storage.inputs.meaning import dimension_names, refuse_packed
from oocattn.storage.inputs.source import Opened
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.locations import Location, parse_location
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import is_array, open_array, read_group
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.remote.store import RemoteStore, open_remote, unwrapped_files
from oocattn.storage.zarr_compat import Store

Place: TypeAlias = "str | Path | Location | zarr.Group | zarr.Array[Any] | Store"
"""Where a node is, as callers give it. A store is its root group."""


def is_zarr(typed: object) -> bool:
    """Whether this is an object of Zarr that `open_node` takes."""
    return isinstance(typed, zarr.Array | zarr.Group | Store)


def open_node(place: Place, storage_options: StorageOptions | None = None) -> tuple[Store, str]:
    """The store whose root is the node at a place, and what messages and records call it.

    Raises ProblemError for what is no place, FileNotFoundError where an archive behind a URL is missing, and RemoteError.
    """
    if isinstance(place, zarr.Array | zarr.Group):
        return _within(place.store, place.path)
    if isinstance(place, Store):
        return _within(place, "")
    location = parse_location(place)
    if location.path is not None:
        return MappedStore(location.path, read_only=True), str(location)
    return open_remote(location, storage_options), str(location)


def _within(store: Store, path: str) -> tuple[Store, str]:
    """A caller's store, from a node on: by our own store where it is of a folder or a file system."""
    if type(store) in (LocalStore, MappedStore):
        folder = (Path(store.root) / path).absolute()  # type: ignore[attr-defined]
        return MappedStore(folder, read_only=True), str(folder)
    if isinstance(store, FsspecStore):
        return _remote(store, path)
    given = GivenStore(store, path)
    return given, given.location


def _remote(store: FsspecStore, path: str) -> tuple[Store, str]:
    root = f"{store.path.rstrip('/')}/{path}".rstrip("/")
    url = unwrapped_files(store.fs).unstrip_protocol(root)
    if url.startswith("file://"):
        folder = parse_location(url).path
        assert folder is not None
        return MappedStore(folder, read_only=True), str(folder)
    ours = RemoteStore.of_files(store.fs, root, url, read_only=True, allowed_exceptions=store.allowed_exceptions)
    return ours, ours.location


def what_is_at(store: Store, location: str) -> str:
    """What is at a location where no group, or no array, is, in a few words."""
    if is_array(store, location):
        return "found an array"
    if read_group(store, location) is not None:
        return "found a group"
    if not isinstance(store, LocalStore):
        return "found neither zarr.json nor .zgroup"
    if store.root.is_dir():
        return "found a folder without zarr.json or .zgroup"
    return "found a file" if store.root.exists() else "found nothing"


def open_zarr_array(name: str, typed: object, storage_options: StorageOptions | None = None) -> Opened | None:
    """The Zarr array at a path or URL, or an object of Zarr; None for anything else."""
    if not (isinstance(typed, str | os.PathLike | Location) or is_zarr(typed)):
        return None
    place: Any = typed
    if not is_zarr(typed):
        place = parse_location(typed, name)
    try:
        store, location = open_node(place, storage_options)
        found = open_array(store, "", location) if is_array(store, location) else None
    except FileNotFoundError:
        raise _no_array(name, str(place), "found nothing") from None
    if found is None:
        raise _no_array(name, location, what_is_at(store, location))
    refuse_packed(found, location)
    array, reading = found, DirectReader()
    return Opened(
        location,
        array.shape,
        lambda own, axes: ZarrSource(own, array, location, reading, axes),
        dimension_names(array),
    )


def _no_array(name: str, location: str, found: str) -> ProblemError:
    group = f"; an array in the group is {location}/{name}, or so" if found == "found a group" else ""
    return ProblemError(
        f"{name}: no Zarr array at {location} ({found}): expected the path or URL of one, FILE.npy, FILE.safetensors:TENSOR "
        f"or FILE.pt:TENSOR{group}"
    )
