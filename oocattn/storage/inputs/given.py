"""The arguments of a problem that are read from files: .npy files, or small arrays of the dataset.

Nothing is unpickled, and nothing is read before its shape is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from oocattn.errors import IntegrityError, ProblemError
from oocattn.problem.given import DTYPES, MOST_ITEMS, Array, GivenArrays
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem
from oocattn.problem_arguments import ProblemArguments, kept_array
from oocattn.storage.inputs.codecs import complete_array, read_span
from oocattn.storage.inputs.dataset import Dataset, pose
from oocattn.storage.inputs.meaning import refuse_packed
from oocattn.storage.inputs.shards import check_shard
from oocattn.storage.layout import chunk_bytes, stored_chunks
from oocattn.storage.locations import Location, parse_location
from oocattn.storage.make.tensor_files import open_npy
from oocattn.storage.metadata import array_names, open_array
from oocattn.storage.zarr_compat import Store
from oocattn.text import printable

MOST_CHUNK_BYTES = 1 << 28
"""Bytes of a chunk at most, in an array of the dataset that an argument names."""


def open_posed(location: str | Path | Location, asked: ProblemArguments) -> tuple[Dataset, Problem]:
    """Open a dataset, and pose the problem that is asked. All arguments must be there, checked. Raises ProblemError."""
    dataset = Dataset.open(location, key_bias=asked["key_bias"])
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    given = GivenArrays(**{name: _read(dataset, name, options.pop(name)) for name in DTYPES if name in options})
    return dataset, pose(dataset, ProblemOptions(out_dtype=options.pop("dtype", None), given=given, **options))


def _read(dataset: Dataset, name: str, source: Array | str | Path) -> Array:
    """The array of an argument: as it was given, from an .npy file, or the dataset's array of that name."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, Path) or source.endswith(".npy"):
        return read_npy(name, source)
    found = read_small(dataset.store, str(source), dataset.location, f"{name} = {source!r}")
    return kept_array(name, found)


def read_npy(name: str, file: str | Path) -> Array:
    """The array in the .npy file that argument `name` names. Raises ProblemError for one that it cannot be."""
    path = parse_location(file).path
    if path is None:
        raise ProblemError(f"{name}: {file} is a URL: expected the path of an .npy file on this machine; copy it first")
    try:
        tensor = open_npy(name, path)
        if np.prod(tensor.shape, dtype=object) > MOST_ITEMS:
            raise ProblemError(f"{name}: {path} has shape {list(tensor.shape)}: expected at most {MOST_ITEMS:,} numbers")
        return kept_array(name, tensor.read([slice(None)] * len(tensor.shape)))
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{name}: there is no file {path}") from None
    except IntegrityError:
        raise ProblemError(f"{name}: {path} is no regular file: expected an .npy file") from None


def read_small(store: Store, name: str, location: str, described: str) -> Array:
    """All of a small array in the root group of a store, of any numbers. Raises ProblemError, calling it `described`."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ProblemError(
            f"{described}: expected the path of an .npy file, which ends so, or the name of an array in {location}"
        )
    array = open_array(store, name, location)
    if array is None:
        found = ", ".join(map(printable, array_names(store)[:10]))
        raise ProblemError(
            f"{described}: found no such array in {location}, only {found}: name one of them, or the path of an .npy file"
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
