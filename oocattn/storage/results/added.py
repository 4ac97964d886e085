"""Arrays that are added to a finished result beside `out` and `lse`: each is there whole or not at all.

They are made in a folder of their own. In a folder each is then renamed into the result's group; in a store its chunks are
written first and its metadata last. Where a store takes no chunk of an array that it does not know, metadata that say
that it is unfinished come before them. The consolidated metadata of the group are written again in the end.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from oocattn.errors import IntegrityError, ResultExistsError
from oocattn.naming import setting
from oocattn.records import parse_json
from oocattn.storage.files import folders
from oocattn.storage.files.durable import MOST_RECORD, sync
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import read_file
from oocattn.storage.files.renaming import rename_new
from oocattn.storage.journal.claims import Claim
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import open_array
from oocattn.storage.nodes import read_node, reader_of
from oocattn.storage.paths import ATTRIBUTES, TRASH_NAME, ResultPaths
from oocattn.storage.results.consolidated import consolidate, consolidated
from oocattn.storage.results.stored import StoredResult
from oocattn.storage.zarr_compat import Store

NAMES = ("received", "entropy", "top_keys", "top_weights", "pooled")
"""Of the arrays that may be added."""

MARK = "survey"
"""The attribute, among ours, by which an added array is told from what somebody else has put there."""

UNFINISHED = "unfinished"
"""The attribute, among ours, of an array whose chunks are not all there."""

_METADATA = "zarr.json"


@dataclass(frozen=True)
class Added:
    """An array that is to be added: its shape, dtype and dimensions, and what its attributes say of it."""

    shape: tuple[int, ...]
    dtype: str
    dimensions: Sequence[str]
    about: Mapping[str, int]

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes."""
        return {ATTRIBUTES: {MARK: dict(self.about)}}


def missing(paths: ResultPaths, wanted: Mapping[str, Added], *, overwrite: bool) -> list[str]:
    """Those of the wanted arrays that a result has not.

    Raises ResultExistsError where it has something else by one of these names: of an earlier survey unless that is
    overwritten, or of somebody else.
    """
    read = reader_of(paths.folder) if paths.stored is None else paths.stored.read
    found = []
    for name, array in wanted.items():
        node = read_node(read, name, str(paths.result))
        if node is None and (paths.stored is not None or not folders.is_taken(paths.folder / name)):
            found.append(name)
            continue
        said = {} if node is None else node[1]
        if (said.get("shape"), said.get("attributes")) == (list(array.shape), array.attributes):
            continue
        attributes = said.get("attributes")
        ours = attributes.get(ATTRIBUTES) if isinstance(attributes, dict) else None
        if isinstance(ours, dict) and UNFINISHED in ours:
            found.append(name)
            continue
        if not (isinstance(ours, dict) and MARK in ours):
            raise ResultExistsError(f"{paths.result} has {name!r}, which no survey wrote: move it away")
        if not overwrite:
            raise ResultExistsError(
                f"{paths.result} has {name!r} of another survey, {said.get('shape')!s:.80} where {list(array.shape)} is "
                f"asked for: ask for that, or replace it with {setting('overwrite', True)}"
            )
    return found


def add_arrays(paths: ResultPaths, made: Path, wanted: Mapping[str, Added], claim: Claim) -> None:
    """Give a finished result the wanted arrays, from the group `made`, which is then without them.

    Those of an earlier survey are replaced. `claim` is to the result's lock. Raises ResultExistsError for what is not ours.
    """
    there = wanted.keys() - missing(paths, wanted, overwrite=True)
    claim.check()
    if there:
        _consolidate(paths, there)  # what it says of an array would be read with chunks of another, or with none
    for name in wanted:
        if paths.stored is None:
            _replace_folder(paths, made / name, paths.folder / name)
        else:
            _replace_objects(paths.stored, made, name)
    if paths.stored is None:
        sync(paths.folder)
    settle(paths, claim)


def settle(paths: ResultPaths, claim: Claim) -> None:
    """Have the consolidated metadata say what arrays there are, and nothing left of those that were replaced."""
    claim.check()
    _consolidate(paths)
    for name in folders.names_in(paths.state):
        if TRASH_NAME.fullmatch(name):
            folders.remove_ours(paths.state / name, folders.GROUP)


def _consolidate(paths: ResultPaths, without: Collection[str] = ()) -> None:
    """Write the consolidated metadata, without some of the arrays."""
    if paths.stored is None:
        consolidate(paths.folder, without)
    else:
        _consolidate_objects(paths.stored, without)


def open_added(paths: ResultPaths, names: Iterable[str]) -> dict[str, zarr.Array[Any]]:
    """The arrays of these names, open for reading. Raises IntegrityError where chunks of one are missing."""
    store: Store
    if paths.stored is None:
        store, path = MappedStore(paths.folder, read_only=True), ""
    else:
        store, path = paths.stored.store, paths.stored.path
    opened = {name: open_array(store, f"{path}/{name}".lstrip("/"), str(paths.result)) for name in names}
    found = {name: array for name, array in opened.items() if array is not None}
    for name, lost in _lost_chunks(paths, found).items():
        raise IntegrityError(
            f"array {name!r} of {paths.result}: {lost:,} of {found[name].nchunks:,} chunks are missing, and Zarr reads them "
            f"as 0; compute it again with {setting('overwrite', True)}"
        )
    return found


def _lost_chunks(paths: ResultPaths, arrays: Mapping[str, zarr.Array[Any]]) -> dict[str, int]:
    """How many chunks of arrays are not there, of those that have lost some."""
    listed = None if paths.stored is None else frozenset(paths.stored.objects.list())
    found = {}
    for name, array in arrays.items():
        chunks = itertools.product(*map(range, array.cdata_shape))
        keys = (f"{name}/{array.metadata.encode_chunk_key(chunk)}" for chunk in chunks)
        lost = sum(not (folders.is_taken(paths.folder / key) if listed is None else key in listed) for key in keys)
        if lost:
            found[name] = lost
    return found


def _replace_folder(paths: ResultPaths, made: Path, place: Path) -> None:
    """Rename the folder of an array to its place; the one that is there is removed."""
    trash = paths.state / f"trash-{uuid.uuid4().hex[:8]}"
    if folders.is_taken(place):
        folders.refuse_foreign(place, folders.GROUP)
        with name_failure("rename", place):
            os.rename(place, trash)
    rename_new(made, place)


def _replace_objects(stored: StoredResult, made: Path, name: str) -> None:
    """Write an array to a store, in place of the one that is there."""
    objects = stored.objects
    objects.remove(f"{name}/{_METADATA}")  # half an array is never seen
    for key in objects.list():
        if key.startswith(f"{name}/"):
            objects.remove(key)
    content = read_file(made / name / _METADATA, MOST_RECORD, follow=False)
    if stored.needs_arrays_first:
        unfinished = {**parse_json(content), "attributes": {ATTRIBUTES: {UNFINISHED: True}}}
        objects.write(f"{name}/{_METADATA}", json.dumps(unfinished).encode())
    for chunk in sorted(path for path in (made / name).rglob("*") if path.is_file() and path.name != _METADATA):
        objects.write(chunk.relative_to(made).as_posix(), read_file(chunk, chunk.stat().st_size, follow=False))
    objects.write(f"{name}/{_METADATA}", content)


def _consolidate_objects(stored: StoredResult, without: Collection[str]) -> None:
    """Write what the arrays that may be added say of themselves into the metadata of the group, without some of them."""
    found = {name: stored.read(f"{name}/{_METADATA}") for name in NAMES if name not in without}
    arrays = {name: parse_json(content) for name, content in found.items() if content is not None}
    content = stored.read(_METADATA)
    if content is None:
        raise IntegrityError(f"{stored} was removed while arrays were added to it")
    document = parse_json(content, not_finite=True)
    others = document.get("consolidated_metadata")
    known = others.get("metadata") if isinstance(others, dict) else None
    kept = {name: said for name, said in known.items() if name not in NAMES} if isinstance(known, dict) else {}
    text = consolidated(document, {**kept, **arrays})
    if text is not None:
        stored.objects.write(_METADATA, text.encode())
