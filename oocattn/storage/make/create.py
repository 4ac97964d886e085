"""Our own Zarr arrays and datasets: how they are made and filled.

Chunks hold plain rows of one head, and are written whole and durably. A dataset gets its name when it is complete.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec
from zarr.storage import LocalStore

from oocattn.errors import OocattnError, ProblemError, ResultExistsError
from oocattn.naming import setting
from oocattn.problem.problem import Problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files.durable import PARTIAL, make_durably, sync, write_durably
from oocattn.storage.files.folders import GROUP, is_folder, is_taken, names_in, pattern_of, refuse_foreign, remove_ours
from oocattn.storage.files.operations import name_failure, words_of
from oocattn.storage.files.renaming import rename_new
from oocattn.storage.layout import chunk_bytes
from oocattn.storage.locations import Location, parse_location, resolve_path
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.remote.store import RemoteStore, open_remote
from oocattn.storage.zarr_compat import ArrayV3Metadata, Buffer, DefaultChunkKeyEncoding
from oocattn.storage.zarr_compat import sync as zarr_sync
from oocattn.threads import ThreadPool
from oocattn.units import ceil_div

CHUNK_BYTES = 32 * 2**20  # size aimed at for a chunk; 8 to 64 MiB read equally well
DIMENSIONS = ("batch", "query_head", "token", "head_dim")  # of q
ROW_MULTIPLE = 4096  # chunks of longer arrays hold a multiple of this many rows, so that they start on page boundaries


Separator = Literal[".", "/"]
"""Between the numbers in the key of a chunk: "." in folders, "/" in stores, of which some take no other."""

logger = logging.getLogger("oocattn")


class OwnStore(LocalStore):
    """A store in a folder of this process alone. LocalStore creates objects by hard links, which some file systems lack."""

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key, unless it is there."""
        if not await self.exists(key):
            await self.set(key, value)


def default_chunk_rows(tokens: int, head_dim: int, itemsize: int) -> int:
    """T, the rows of a chunk: `tokens`, or level parts of 16 to 32 MiB."""
    most = CHUNK_BYTES // (head_dim * itemsize)
    if tokens <= most:
        return tokens
    level = ceil_div(tokens, ceil_div(tokens, most))
    return ceil_div(level, ROW_MULTIPLE) * ROW_MULTIPLE


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int | None = None,
    dimensions: Sequence[str] = DIMENSIONS,
    separator: Separator = ".",
) -> zarr.Array[Any]:
    """Create array `name`, [B, H, N, D] or [B, H, N], of chunks of one head: (1, 1, T, D) or (1, 1, T).

    `chunk_rows` is T, by default `default_chunk_rows`. `dimensions` are named, so that xarray opens the group. `separator`
    stands between the numbers in a chunk's key. Raises zarr's ContainsArrayError where the group has such an array.
    """
    tokens, row = shape[2], shape[3:]
    numpy_type = numpy_dtype(dtype)
    rows = chunk_rows or default_chunk_rows(tokens, int(np.prod(row)), numpy_type.itemsize)
    return _create(group, name, shape, numpy_type, (1, 1, rows, *row), dimensions[: len(shape)], separator)


def write_whole(
    group: zarr.Group, name: str, data: NDArray[Any], dimensions: Sequence[str], separator: Separator = "."
) -> None:
    """Write a small array, in a group of a local store, as one chunk; when this returns, that is on disk."""
    array = _create(group, name, data.shape, data.dtype, data.shape, dimensions, separator)
    path = chunk_file(array, (0,) * data.ndim)
    make_durably(path.parent)
    write_durably(path, [np.ascontiguousarray(data)])


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...],
    dimensions: Sequence[str],
    separator: Separator,
) -> zarr.Array[Any]:
    """Create an array of Zarr v3: uncompressed, little-endian, fill value 0, empty chunks written.

    With "." as the separator all chunk files lie in one folder: a durable write then syncs that folder and no others.
    """
    with name_failure("make", str(group.store_path / name).removeprefix("file://")):
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            dimension_names=dimensions,
            chunk_key_encoding={"name": "default", "separator": separator},
            serializer=BytesCodec(endian="little"),
            compressors=None,
            filters=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )


def dimension_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """The names of the dimensions of a dataset's arrays [B, H, N, ...]: those of one length alone share a name."""
    q, v = shapes["q"], shapes["v"]
    query, key = ("token", "token") if q[2] == v[2] else ("query_token", "key_token")
    value = "head_dim" if q[3] == v[3] else "value_dim"
    bias = shapes.get("key_bias", q)
    return {
        "q": ("batch", "query_head", query, "head_dim"),
        "k": ("batch", "kv_head", key, "head_dim"),
        "v": ("batch", "kv_head", key, value),
        "key_bias": ("batch" if bias[0] == q[0] else "bias_batch", "query_head" if bias[1] == q[1] else "bias_head", key),
    }


def out_dimensions(problem: Problem) -> tuple[str, ...]:
    """The names of the dimensions of `out`, and of `lse` without the last: as in the dataset, where all rows are asked."""
    q = (problem.batch, problem.query_heads, problem.queries, problem.head_dim)
    names = dimension_names({"q": q, "v": (problem.batch, problem.kv_heads, problem.keys, problem.value_dim)})
    batch, head, token, _ = names["q"]
    heads = head if problem.heads is None else "asked_query_head"
    rows = token if problem.out_rows == problem.queries else "asked_token"
    return batch, heads, rows, names["v"][-1]


def chunk_selection(array: zarr.Array[Any], coords: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of `array` in chunk `coords`; shorter than a chunk at the edge."""
    return tuple(
        slice(i * size, min((i + 1) * size, length))
        for i, size, length in zip(coords, array.chunks, array.shape, strict=True)
    )


def chunk_file(array: zarr.Array[Any], coords: tuple[int, ...]) -> Path:
    """The file of chunk `coords` of an array of `create_array`."""
    assert isinstance(array.store, LocalStore)
    return array.store.root / array.path / array.metadata.encode_chunk_key(coords)


# The durable commit of one chunk. After a crash at any step, what lies under the chunk's name is whole: the old bytes,
# the new bytes, or nothing.
#   1. Write the rows under a temporary name in the chunk's own folder. The name is unique, so that a writer given up
#      for dead cannot tear the file of its successor. Whole pages go to the disk directly, past the page cache.
#   2. Extend the file with zeros to a full chunk, which is what Zarr demands of a chunk at the edge.
#   3. fsync the file: its bytes are on disk before its name is.
#   4. Rename it to the chunk's name; within a folder this is atomic.
#   5. fsync the array's folder, which holds all its chunks: now the name is on disk too.
def write_chunk(array: zarr.Array[Any], coords: tuple[int, ...], data: NDArray[Any]) -> None:
    """Write chunk `coords` of `array` whole; when this returns, it is on disk.

    `data` has the shape of `chunk_selection(array, coords)` and the dtype of the array. Arrays of another kind than
    `create_array` makes, or not in a local store, are written through Zarr, without that promise. Raises ValueError for
    another shape or dtype, OSError as the file system does.
    """
    selection = chunk_selection(array, coords)
    expected = tuple(part.stop - part.start for part in selection)
    if data.shape != expected or data.dtype != array.dtype:
        raise ValueError(
            f"chunk {coords} of array {array.name!r} takes {list(expected)} {array.dtype}: "
            f"found {list(data.shape)} {data.dtype}"
        )
    if not (isinstance(array.store, LocalStore) and _is_plain(array)):
        array[selection] = data
        return
    write_durably(chunk_file(array, coords), [np.ascontiguousarray(data)], chunk_bytes(array))


def fill_array(
    array: zarr.Array[Any], rows: Callable[[int, int, int, int], NDArray[Any]], workers: int | None = None
) -> None:
    """Write every chunk of `array` from `rows(batch, head, start, stop)`.

    These are [stop - start, D] in the dtype of the array. Runs in `workers` threads (default: one a core), each with one
    chunk in memory. The heads of a range of rows follow one another, so that a source which interleaves them is read once.
    """
    batch, heads, tokens = array.cdata_shape[:3]

    def write(chunk: tuple[int, int, int]) -> None:
        b, part, h = chunk
        coords = (b, h, part, *(0 for _ in array.shape[3:]))
        span = chunk_selection(array, coords)[2]
        write_chunk(array, coords, rows(b, h, span.start, span.stop)[np.newaxis, np.newaxis])

    with ThreadPool(workers or os.cpu_count() or 1, "oocattn-create") as pool:
        for _ in pool.map(write, itertools.product(range(batch), range(tokens), range(heads))):
            pass


@contextmanager
def create_dataset(
    path: str | Path,
    *,
    attributes: dict[str, Any],
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
) -> Iterator[zarr.Group]:
    """Create a Zarr group, to be filled inside the `with`, at `path` after it.

    Until then it grows under a temporary name beside `path`, and an exception removes it. (At a URL other than file://
    it is made in place.) Raises ProblemError for a location that is not taken, and ResultExistsError where something is
    at `path`, unless `overwrite` is given and that something is a Zarr group or array.
    """
    location = parse_location(path)
    if location.path is None:
        yield _create_remote(location, attributes, overwrite, storage_options)
        return
    local = resolve_path(location.path)
    refuse_to_destroy(local, overwrite)
    with name_failure("make", local.parent):
        local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f".{local.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with name_failure("make", temporary):
            group = zarr.create_group(OwnStore(temporary), attributes=attributes, zarr_format=3)
        yield group
        sync_metadata(temporary)
        _move_into_place(temporary, local, overwrite)
    except BaseException:
        with suppress(OSError):  # what went wrong before is what is to be told
            remove_ours(temporary, GROUP)
        raise


def _is_plain(array: zarr.Array[Any]) -> bool:
    """Whether a chunk of `array` is a file of its rows, as of `create_array`."""
    return (
        isinstance(array.metadata, ArrayV3Metadata)
        and array.metadata.codecs == (BytesCodec(endian="little"),)
        and array.metadata.chunk_key_encoding == DefaultChunkKeyEncoding(separator=".")
        and array.chunks[:2] == (1, 1)
        and array.chunks[3:] == array.shape[3:]
    )


def _create_remote(
    location: Location, attributes: dict[str, Any], overwrite: bool, storage_options: StorageOptions | None
) -> zarr.Group:
    url = str(location)
    try:
        store = open_remote(location, storage_options, read_only=False)
        foreign = zarr_sync(_foreign_key(store)) if overwrite else None
        if foreign is not None:
            raise ResultExistsError(
                f"{foreign} lies in {url}, which would be removed, and is not a file of a Zarr group: move it away"
            )
        return zarr.open_group(store, mode="w" if overwrite else "w-", attributes=attributes, zarr_format=3)
    except OocattnError:
        raise
    except FileExistsError as error:
        raise ResultExistsError(
            f"{url} exists already: choose another path, or replace it with {setting('overwrite', True)}"
        ) from error
    except Exception as error:  # each file system has its own
        raise ProblemError(f"{url} cannot be created ({error}): check the URL and its access") from error


async def _foreign_key(store: RemoteStore) -> str | None:
    """A key in a store that is none of a Zarr group; None where all are."""
    pattern = pattern_of(GROUP)
    async for key in store.list():
        if not pattern.fullmatch(key):
            return key
    return None


def refuse_to_destroy(path: Path, overwrite: bool) -> None:
    """Raise ResultExistsError where something is at `path`. A Zarr group or array alone may be, with `overwrite`."""
    if not is_taken(path):
        return
    if not overwrite:
        raise ResultExistsError(
            f"{path} exists already: choose another path, or replace it with {setting('overwrite', True)}"
        )
    if not any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray")):
        raise ResultExistsError(f"{path} is not a Zarr group: only those are overwritten; remove it or choose another path")
    refuse_foreign(path, GROUP)


def sync_metadata(group: Path) -> None:
    """Have the metadata of a group and its arrays on disk, which zarr does not see to."""
    for folder in (group, *(group / name for name in names_in(group) if is_folder(group / name))):
        sync(folder / "zarr.json")
        sync(folder)


def _move_into_place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give the complete group at `temporary` the name `path`.

    With `overwrite` that may be another group's. Raises ResultExistsError where something else is there by then. Where it
    fails, what was there has its name again.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    refuse_to_destroy(path, overwrite)
    replaced = is_taken(path)
    if replaced:
        rename_new(path, aside)
    try:
        rename_new(temporary, path)
    except OSError as error:
        if replaced:
            try:
                rename_new(aside, path)
            except OSError as second:
                logger.warning("%s; the group that was there is now at %s: rename it", words_of(second), aside)
        if isinstance(error, FileExistsError):
            raise ResultExistsError(f"{path} has appeared meanwhile: move it away and try again") from None
        raise
    sync(path.parent)
    if not remove_ours(aside, GROUP):
        logger.warning("%s was not removed: it holds files that Zarr did not write; move them away, and remove it", aside)
