"""Arguments that are arrays, kept in a result's group: `resume` and `verify` need them.

Each is an array of its argument's name, in one chunk. Reading takes neither Zarr nor PyTorch, unless somebody has stored the
result in another way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oocattn.errors import IntegrityError, ProblemError
from oocattn.naming import setting
from oocattn.problem.given import DTYPES, MOST_ITEMS, Array, GivenArrays
from oocattn.storage.files.regular import read_file
from oocattn.storage.nodes import StoredGroup, read_node, reader_of

if TYPE_CHECKING:
    import zarr

    from oocattn.storage.make.create import Separator


def _again() -> str:
    return f"copy the result again, or compute it again with {setting('overwrite', True)}"


_PLAIN_KEYS = [{"name": "default", "configuration": {"separator": each}} for each in "./"]

DIMENSIONS = {
    "cu_seqlens_q": ("boundary",),
    "cu_seqlens_k": ("boundary",),
    "seqused_k": ("batch",),
    "alibi_slopes": ("batch", "query_head"),
    "learnable_sink": ("query_head",),
}
"""What the dimensions of each are called. The batch may be left out."""


def write_given(group: zarr.Group, given: GivenArrays, separator: Separator = ".") -> None:
    """Write the arrays that were given into the group of a result, durably."""
    from oocattn.storage.make.create import write_whole

    for name, array in given.items():
        write_whole(group, name, array, DIMENSIONS[name][-array.ndim :], separator)


def read_given(group: Path | StoredGroup, digests: Mapping[str, str]) -> GivenArrays:
    """Read the arrays of these digests in the group of a result. Raises IntegrityError where one is missing or another."""
    for name in digests:
        if name not in DTYPES:
            raise IntegrityError(f"{group}: its problem has the array {name!r:.80}: expected some of {', '.join(DTYPES)}")
    given = GivenArrays(**{name: _read(group, name) for name in digests})
    for name, array in given.items():
        array.flags.writeable = False
        if given.digests[name] != digests[name]:
            raise IntegrityError(f"{group}/{name} is not what the run was given (digest {digests[name]}): {_again()}")
    return given


def _read(group: Path | StoredGroup, name: str) -> Array:
    """Read one array: its chunk, or through Zarr where it is stored in another way."""
    dtype = DTYPES[name]
    node = read_node(reader_of(group), name, str(group))
    if node is None or node[0] != "array":
        raise IntegrityError(f"{group} has no array {name!r}, which its run was given: {_again()}")
    found, shape, kind = node[1], node[1].get("shape"), node[1].get("data_type", node[1].get("dtype"))
    whole = isinstance(shape, list) and 1 <= len(shape) <= 2 and all(type(size) is int and size > 0 for size in shape)
    if not isinstance(shape, list) or not whole or math.prod(shape) > MOST_ITEMS or kind not in (dtype.name, dtype.str):
        raise IntegrityError(f"{group}/{name} is {kind!r:.40} {shape!r:.80}: it is damaged; {_again()}")
    if not _is_plain(found):
        return _read_with_zarr(group, name)
    separator = found["chunk_key_encoding"]["configuration"]["separator"]
    key, nbytes = f"{name}/c" + f"{separator}0" * len(shape), math.prod(shape) * dtype.itemsize
    content = _content(group, key, nbytes)
    if content is None:
        raise IntegrityError(f"{group}/{key} is missing: {_again()}")
    if len(content) != nbytes:
        raise IntegrityError(f"{group}/{key} has {len(content):,} bytes, expected {nbytes:,}: {_again()}")
    return np.frombuffer(content, dtype).reshape(shape)


def _content(group: Path | StoredGroup, key: str, nbytes: int) -> bytes | None:
    if not isinstance(group, Path):
        return group.read(key)
    with suppress(FileNotFoundError, NotADirectoryError):
        return read_file(group / key, nbytes, follow=False)
    return None


def _is_plain(metadata: Mapping[str, object]) -> bool:
    """Whether metadata say what `write_given` writes: one chunk of little-endian numbers."""
    return (
        metadata.get("chunk_grid") == {"name": "regular", "configuration": {"chunk_shape": metadata.get("shape")}}
        and metadata.get("chunk_key_encoding") in _PLAIN_KEYS
        and metadata.get("codecs") == [{"name": "bytes", "configuration": {"endian": "little"}}]
        and not metadata.get("storage_transformers")
    )


def _read_with_zarr(group: Path | StoredGroup, name: str) -> Array:
    from oocattn.storage.inputs.given import read_small
    from oocattn.storage.mapped_store import MappedStore

    store, path = (MappedStore(group, read_only=True), "") if isinstance(group, Path) else (group.store, group.path)
    try:
        found = read_small(store, f"{path}/{name}".lstrip("/"), str(group), name)
    except ProblemError as error:
        raise IntegrityError(f"{error}") from None
    return found.astype(DTYPES[name])
