"""Arguments that are arrays, kept in a result's group: `resume` and `verify` need them.

Each is an array of its argument's name, in one chunk. Reading takes neither Zarr nor PyTorch, unless somebody has stored the
result in another way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oocattn.errors import IntegrityError, ProblemError
from oocattn.problem.given import DTYPES, MOST_ITEMS, Array, GivenArrays, digest_of
from oocattn.storage.files.regular import read_file
from oocattn.storage.nodes import read_in_folder, read_node

if TYPE_CHECKING:
    import zarr

_AGAIN = "copy the result again, or compute it again with overwrite=True (--overwrite)"

DIMENSIONS = {
    "cu_seqlens_q": ("boundary",),
    "cu_seqlens_k": ("boundary",),
    "seqused_k": ("batch",),
    "alibi_slopes": ("batch", "input_query_head"),
    "learnable_sink": ("input_query_head",),
}
"""What the dimensions of each are called: `out` may have fewer heads than q. The batch may be left out."""


def write_given(group: zarr.Group, given: GivenArrays) -> None:
    """Write the arrays that were given into the group of a result, durably."""
    from oocattn.storage.make.create import write_whole

    for name, array in given.items():
        write_whole(group, name, array, DIMENSIONS[name][-array.ndim :])


def read_given(group: Path, digests: Mapping[str, str]) -> GivenArrays:
    """Read the arrays of these digests in the group of a result. Raises IntegrityError where one is missing or another."""
    arrays = {}
    for name, digest in digests.items():
        if name not in DTYPES:
            raise IntegrityError(f"{group}: its problem has the array {name!r:.80}: expected some of {', '.join(DTYPES)}")
        array = _read(group, name)
        if digest_of(array) != digest:
            raise IntegrityError(f"{group / name} is not what the run was given (digest {digest}): {_AGAIN}")
        array.flags.writeable = False
        arrays[name] = array
    return GivenArrays(**arrays)


def _read(group: Path, name: str) -> Array:
    """Read one array: its chunk, or through Zarr where it is stored in another way."""
    dtype = DTYPES[name]
    node = read_node(partial(read_in_folder, group), name, str(group))
    if node is None or node[0] != "array":
        raise IntegrityError(f"{group} has no array {name!r}, which its run was given: {_AGAIN}")
    found, shape, kind = node[1], node[1].get("shape"), node[1].get("data_type", node[1].get("dtype"))
    whole = isinstance(shape, list) and 1 <= len(shape) <= 2 and all(type(size) is int and size > 0 for size in shape)
    if not isinstance(shape, list) or not whole or math.prod(shape) > MOST_ITEMS or kind not in (dtype.name, dtype.str):
        raise IntegrityError(f"{group / name} is {kind!r:.40} {shape!r:.80}: it is damaged; {_AGAIN}")
    if not _is_plain(found):
        return _read_with_zarr(group, name)
    path, nbytes = group / name / ("c" + ".0" * len(shape)), math.prod(shape) * dtype.itemsize
    try:
        content = read_file(path, nbytes, follow=False)
    except (FileNotFoundError, NotADirectoryError):
        raise IntegrityError(f"{path} is missing: {_AGAIN}") from None
    if len(content) != nbytes:
        raise IntegrityError(f"{path} has {len(content):,} bytes, expected {nbytes:,}: {_AGAIN}")
    return np.frombuffer(content, dtype).reshape(shape)


def _is_plain(metadata: Mapping[str, object]) -> bool:
    """Whether metadata say what `write_given` writes: one chunk of little-endian numbers."""
    return (
        metadata.get("chunk_grid") == {"name": "regular", "configuration": {"chunk_shape": metadata.get("shape")}}
        and metadata.get("chunk_key_encoding") == {"name": "default", "configuration": {"separator": "."}}
        and metadata.get("codecs") == [{"name": "bytes", "configuration": {"endian": "little"}}]
        and not metadata.get("storage_transformers")
    )


def _read_with_zarr(group: Path, name: str) -> Array:
    from oocattn.storage.inputs.given import read_small
    from oocattn.storage.mapped_store import MappedStore

    try:
        found = read_small(MappedStore(group, read_only=True), name, str(group), name)
    except ProblemError as error:
        raise IntegrityError(f"{error}") from None
    return found.astype(DTYPES[name])
