"""The arguments of a problem that are read from files: .npy files, or small arrays of the dataset.

Nothing is unpickled, and nothing is read before its shape is checked.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np

from oocattn.errors import ProblemError
from oocattn.naming import as_given, named, setting
from oocattn.problem.given import DTYPES, MOST_ITEMS, Array, GivenArrays
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem
from oocattn.problem_arguments import ProblemArguments, kept_array, stated
from oocattn.storage.inputs.codecs import complete_array, read_span
from oocattn.storage.inputs.dataset import Dataset, pose
from oocattn.storage.inputs.meaning import refuse_packed
from oocattn.storage.inputs.opening import InputsLike, open_inputs
from oocattn.storage.inputs.shards import check_shard
from oocattn.storage.inputs.tensor_files import open_npy
from oocattn.storage.layout import chunk_bytes, stored_chunks
from oocattn.storage.locations import parse_location
from oocattn.storage.metadata import array_names, open_array
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.zarr_compat import Store
from oocattn.text import printable

logger = logging.getLogger("oocattn")

MOST_CHUNK_BYTES = 1 << 28
"""Bytes of a chunk at most, in an array of the dataset that an argument names."""

_MOST_NAME = 255  # bytes of a name, as file systems have it


def open_posed(
    inputs: InputsLike, asked: ProblemArguments, storage_options: StorageOptions | None = None
) -> tuple[Dataset, Problem]:
    """Open the inputs, and pose the problem that is asked. All arguments must be there, checked. Raises ProblemError."""
    asks: dict[str, Any] = {**asked}
    recorded = asks.pop("recorded")
    dataset = open_inputs(inputs, key_bias=asks["key_bias"], recorded=recorded, storage_options=storage_options)
    if dataset.recorded is not None:
        asks = dataset.recorded.complete(asks, dataset.location)
    options = stated(asks)
    given = GivenArrays(**{name: _read(dataset, name, options.pop(name)) for name in DTYPES if name in options})
    problem = pose(dataset, ProblemOptions(out_dtype=options.pop("dtype", None), given=given, **options))
    if words := dataset.words(problem):
        logger.info("%s: %s (%s leaves that out)", dataset.location, words, setting("recorded", False))
    return dataset, problem


def _read(dataset: Dataset, name: str, source: Array | str | Path) -> Array:
    """The array of an argument: as it was given, from an .npy file, or the dataset's array of that name."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, Path) or source.endswith(".npy"):
        found = read_npy(name, source)
    else:
        found = read_small(dataset.store, str(source), dataset.location, as_given(name, source))
    described = f"{as_given(name, source)} ({found.dtype} {list(found.shape)})"
    return kept_array(name, found, lambda expected: ProblemError(f"{described}: expected {expected}"))


def read_npy(name: str, file: str | Path) -> Array:
    """The array in the .npy file that argument `name` names. Raises ProblemError where there is none."""
    try:
        path = parse_location(file).path
    except ProblemError as error:
        raise ProblemError(f"{named(name)}: {error}") from None
    if path is None:
        raise ProblemError(
            f"{named(name)}: {file} is a URL: expected the path of an .npy file on this machine; copy it first"
        )
    try:
        tensor = open_npy(named(name), path)
        if np.prod(tensor.shape, dtype=object) > MOST_ITEMS:
            raise ProblemError(
                f"{named(name)}: {path} has shape {list(tensor.shape)}: expected at most {MOST_ITEMS:,} numbers"
            )
        return tensor.read([slice(None)] * len(tensor.shape))
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{named(name)}: there is no file {path}") from None


def read_small(store: Store, name: str, location: str, described: str) -> Array:
    """All of a small array in the root group of a store, of any numbers. Raises ProblemError, calling it `described`."""
    if not _is_name(name):
        raise ProblemError(
            f"{described}: expected the path of an .npy file, which ends so, or the name of an array in {location}"
        )
    try:
        array = open_array(store, name, location)
    except ProblemError as error:
        raise ProblemError(f"{described}: {error}") from None
    if array is None:
        found = ", ".join(map(printable, array_names(store)[:10]))
        raise ProblemError(
            f"{described}: found no such array in {location}, only {found}: name one of them, or the path of an .npy file, "
            "or give the numbers themselves"
        )
    if not 1 <= array.ndim <= 2 or np.prod(array.shape, dtype=object) > MOST_ITEMS or chunk_bytes(array) > MOST_CHUNK_BYTES:
        raise ProblemError(
            f"{described}: array {list(array.shape)} in chunks {list(array.chunks)}: expected at most {MOST_ITEMS:,} "
            f"numbers in one dimension or two, in chunks of at most {MOST_CHUNK_BYTES:,} bytes"
        )
    refuse_packed(array, location)
    for shard in stored_chunks(array) if array.shards is not None else ():
        check_shard(array, shard, location)
    out = np.empty(array.shape, array.dtype.newbyteorder("="))
    if out.size:
        read_span(complete_array(array, location), location, (), 0, out)
    return cast(Array, out)


def _is_name(name: str) -> bool:
    """True for what an array in a root group may be called."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < length <= _MOST_NAME and name not in (".", "..") and "/" not in name and "\0" not in name
