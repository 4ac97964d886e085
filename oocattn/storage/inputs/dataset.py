"""A dataset: a Zarr group with the arrays q, k and v, and perhaps key_bias, at a path or behind a URL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import zarr

from oocattn.errors import ProblemError, RemoteDeniedError
from oocattn.problem.arrays import KEY_BIAS, ArraySpec
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem, make_problem
from oocattn.records import differences
from oocattn.storage.chunk_errors import PageError, missing_chunk, torn_chunk
from oocattn.storage.inputs.direct import FastestReader
from oocattn.storage.inputs.fingerprints import NAMES, Fingerprints, chunk_files, fingerprints_of, identity
from oocattn.storage.inputs.meaning import MEANINGFUL, check_axes, refuse_packed, warn_if_transposed
from oocattn.storage.inputs.readers import InputArray
from oocattn.storage.inputs.shards import check_shard
from oocattn.storage.layout import chunk_key, stored_bytes, stored_chunks
from oocattn.storage.locations import Location, parse_location, recorded_location
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import array_names, is_array, open_array, open_consolidated, read_group
from oocattn.storage.remote.store import open_remote
from oocattn.storage.zarr_compat import Store, sync
from oocattn.text import printable

ASKED = 64  # chunks of a remote array that are asked for at the same time, where they are not listed
MOST_NAMED = 10  # arrays that the message names where one is missing


@dataclass(frozen=True)
class Dataset:
    """The input of a run: its location, and the arrays "q", "k" and "v", and "key_bias" where there is one and it is used.

    `location` is an absolute path, or a URL without credentials. Other processes are sent the arrays' metadata alone.
    """

    location: str
    arrays: dict[str, InputArray]

    @classmethod
    def open(cls, path_or_url: str | Path | Location, *, key_bias: bool = True) -> Dataset:
        """Open a Zarr group, v3 or v2, for reading, at a path or a URL, which is checked first.

        Without `key_bias` an array of that name is not looked at. Raises ProblemError if there is no group, no array q, k or
        v in it that can be read, or one whose attributes give its numbers or axes another meaning, and IntegrityError if its
        metadata is damaged.
        """
        location = parse_location(path_or_url)
        return cls._open_in(_open_store(location), str(location), (KEY_BIAS,) if key_bias else ())

    @classmethod
    def _open_in(cls, store: Store, location: str, optional: Sequence[str]) -> Dataset:
        group = read_group(store, location)
        if group is None:
            raise _no_group(location, _what_is_at(store, location))
        required = [name for name in NAMES if name != KEY_BIAS]
        arrays = {name: _array(store, name, location) for name in required}
        consolidated = open_consolidated(store, group, (*required, *optional), location)
        for name in optional:
            found = _optional_array(store, name, location, listed=name in consolidated)
            arrays |= {} if found is None else {name: found}
        for name, other in consolidated.items():
            _check_consolidated(arrays[name], other, location)
        for array in arrays.values():
            refuse_packed(array, location)
        check_axes(arrays, location)
        return cls.of(location, arrays)

    def reopen(self) -> Dataset:
        """The dataset as it is now: its metadata is read again. Raises as `open`."""
        return self._open_in(self.store, self.location, [name for name in self.arrays if name == KEY_BIAS])

    @classmethod
    def open_recorded(cls, recorded: object, named: str | Path | Location | None, *, key_bias: bool = True) -> Dataset:
        """Open the dataset of a result or journal: where `named`, else at the `recorded_location`. Raises as both."""
        if named is not None:
            return cls.open(named, key_bias=key_bias)
        try:
            return cls.open(recorded_location(recorded), key_bias=key_bias)
        except ProblemError as error:
            raise ProblemError(f"{error}; if it was moved, say where with dataset= (--dataset)") from error

    @classmethod
    def of(cls, location: str, arrays: dict[str, zarr.Array[Any]]) -> Dataset:
        """The dataset of these open arrays, by name."""
        fastest = FastestReader()
        return cls(location, {name: InputArray(name, array, location, fastest) for name, array in arrays.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.of, (self.location, {name: found.array for name, found in self.arrays.items()})

    @property
    def store(self) -> Store:
        """The store of the group."""
        return self.arrays["q"].array.store

    @property
    def folder(self) -> Path | None:
        """Where the dataset lies, or None where that is no local folder."""
        return self.store.root if isinstance(self.store, MappedStore) else None

    @property
    def specs(self) -> tuple[ArraySpec, ArraySpec, ArraySpec]:
        """Names, shapes and dtypes of q, k and v."""
        return self.arrays["q"].spec, self.arrays["k"].spec, self.arrays["v"].spec

    @property
    def key_bias(self) -> ArraySpec | None:
        """Name, shape and dtype of key_bias; None where there is none, or none is used."""
        found = self.arrays.get(KEY_BIAS)
        return None if found is None else found.spec

    def check_complete(self) -> None:
        """Check that every chunk of the arrays is there. Raises IntegrityError naming array, chunk and key.

        A chunk that is stored as it is (no compressor, no shards) must have its size, where that is told. Elsewhere
        than in a local folder the keys are listed once, where that is possible, and those not listed are asked for by
        name. Of a shard the index is read as well (16 bytes a chunk). What chunks decode to is not checked.
        """
        for array in (found.array for found in self.arrays.values()):
            expected = stored_bytes(array)
            for coordinates, key, size in _sizes(array, self.location):
                if expected is not None and size is not None and size != expected:
                    raise torn_chunk(self.location, key, size, expected)
                if array.shards is not None:
                    check_shard(array, coordinates, self.location)

    def fingerprints(self) -> Fingerprints:
        """The fingerprints of the dataset as it is now. Raises IntegrityError for a chunk that is found to be missing."""
        found = [fingerprints_of(name, found.array, self.location) for name, found in self.arrays.items()]
        return Fingerprints(*("-".join(digests) for digests in zip(*found, strict=True)))

    @cached_property
    def as_found(self) -> Fingerprints:
        """The fingerprints when first asked for: later ones show every change."""
        return self.fingerprints()

    def fingerprint(self, *, within_run: bool = False) -> str:
        """One fingerprint of the dataset as it is now: recorded, or `within_run`."""
        found = self.fingerprints()
        return found.within_run if within_run else found.recorded


def pose(dataset: Dataset, options: ProblemOptions) -> Problem:
    """The problem of a dataset with these options. Raises as `make_problem`, and warns of more heads than tokens."""
    problem = make_problem(*dataset.specs, options, dataset.key_bias)
    warn_if_transposed(dataset.specs[0], dataset.specs[1])
    return problem


def check_poses(dataset: Dataset, problem: Problem, whose: str) -> None:
    """Raise ProblemError where a dataset poses another problem than `problem`, of a "run" or a "result" (`whose`)."""
    posed = pose(dataset, problem.options)
    if posed != problem:
        raise ProblemError(
            f"{dataset.location} poses another problem than the {whose}'s ({differences(problem, posed)}): name the dataset "
            "that the run read (--dataset)"
        )


def _meaning(array: zarr.Array[Any]) -> dict[str, Any]:
    """What metadata say of an array's numbers and axes, by name."""
    attributes = {name: array.attrs[name] for name in MEANINGFUL if name in array.attrs}
    names = getattr(array.metadata, "dimension_names", None)
    return {**identity(array), "dimension_names": names and list(names), **attributes}


def _check_consolidated(array: zarr.Array[Any], consolidated: zarr.Array[Any], location: str) -> None:
    """Raise ProblemError where consolidated metadata differ from the array's. Zarr and xarray believe the former."""
    own, other = _meaning(array), _meaning(consolidated)
    for field in sorted({*own, *other}):
        if json.dumps(own.get(field), default=str) != json.dumps(other.get(field), default=str):
            raise ProblemError(
                f"array {array.path!r} of {location} has {field} = {printable(repr(own.get(field))):.80}, but "
                f"{printable(repr(other.get(field))):.80} in the consolidated metadata of its group: expected the same in "
                "both, for many programs read these; bring them up to date with zarr.consolidate_metadata(PATH)"
            )


def _sizes(array: zarr.Array[Any], location: str) -> Iterator[tuple[tuple[int, ...], str, int | None]]:
    """Coordinates, key and size, if it is told, of every chunk. Raises at the first that is missing."""
    store: Any = array.store
    if isinstance(store, MappedStore):
        yield from ((coordinates, key, status.st_size) for coordinates, key, status in chunk_files(array, location))
        return
    listed, stored = sync(store.list_sizes(array.path)), stored_chunks(array)
    while batch := {chunk_key(array, coordinates): coordinates for coordinates in itertools.islice(stored, ASKED)}:
        found = sync(store.find_sizes([key for key in batch if key not in listed]))
        for key, coordinates in batch.items():
            if key not in listed and key not in found:
                raise missing_chunk(location, key)
            yield coordinates, key, listed[key] if key in listed else found[key]


def _open_store(location: Location) -> Store:
    """A store at a location that was checked."""
    if location.path is not None:
        return MappedStore(location.path, read_only=True)
    try:
        return open_remote(location)
    except FileNotFoundError as error:
        raise _no_group(str(location), "found nothing") from error


def _what_is_at(store: Store, location: str) -> str:
    """What is at a location where no group is, in a few words."""
    if is_array(store, location):
        return "found an array"
    if "://" in location:
        return "found neither zarr.json nor .zgroup"
    path = Path(location)
    if path.is_dir():
        return "found a folder without zarr.json or .zgroup"
    return "found a file" if path.exists() else "found nothing"


def _no_group(location: str, reason: str) -> ProblemError:
    return ProblemError(
        f"no Zarr group at {location} ({reason}): give the path or URL of a group with the arrays q, k and v; "
        "`oocattn import` makes one from other files"
    )


def _optional_array(store: Store, name: str, location: str, *, listed: bool) -> zarr.Array[Any] | None:
    """An array that may be missing, unless it is listed in consolidated metadata."""
    try:
        found = open_array(store, name, location)
    except (RemoteDeniedError, PageError):  # also the answer for a missing object, of some servers
        if listed:
            raise
        return None
    if found is None and listed:
        raise ProblemError(
            f"array {name!r} of {location} is missing, but in the consolidated metadata of its group: expected it in both "
            "or in neither; bring them up to date with zarr.consolidate_metadata(PATH)"
        )
    return found


def _array(store: Store, name: str, location: str) -> zarr.Array[Any]:
    array = open_array(store, name, location)
    if array is not None:
        return array
    found = array_names(store)
    more = " and more" if len(found) > MOST_NAMED else ""
    shown = f"found {[printable(other) for other in found[:MOST_NAMED]]}{more}"
    if not store.supports_listing:
        shown = "its server does not list what is there"
    raise ProblemError(
        f"no array {name!r} in {location}: {shown}; a dataset has the arrays q, k and v: rename the "
        "array, or import the tensors with `oocattn import`"
    )
