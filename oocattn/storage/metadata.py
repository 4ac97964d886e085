"""Zarr arrays, opened only after their metadata is checked.

Zarr believes what it reads: it makes codecs by name, and objects of any size. Here a node's JSON is read once
(`nodes`), and what Zarr gets is the very content that was checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import zarr
from zarr.storage import LocalStore

import oocattn.storage.bfloat16  # noqa: F401  registers the data type
from oocattn.errors import ProblemError, RemoteDeniedError
from oocattn.filters import no_warnings
from oocattn.storage import nodes
from oocattn.storage.bounded import read_start
from oocattn.storage.files.operations import name_failure
from oocattn.storage.inputs.codec_chain import chain_of, v2_codecs, v3_codecs
from oocattn.storage.nodes import (
    MOST_BYTES,
    Read,
    attributes_of,
    damaged_metadata,
    node_name,
    read_document,
    read_in_folder,
    read_node,
)
from oocattn.storage.zarr_compat import Store, array_at, parse_metadata, sync
from oocattn.text import printable

MOST_EXTENT = 1 << 48
MOST_DIMENSIONS = 8
MOST_CHUNK_BYTES = 1 << 40
MOST_ARRAY_BYTES = 1 << 62

MOST_ENTRIES = 1000  # entries of a folder that are looked at for a message

_V3_TYPES = {
    **{"bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4},
    **{"float32": 4, "int64": 8, "uint64": 8, "float64": 8, "complex64": 8, "complex128": 16},
}
_V2_TYPE = re.compile(r"[<>|]([biufc])(1|2|4|8|16)")


def read_group(store: Store, location: str) -> dict[str, Any] | None:
    """The metadata of the group at the root of a store; None where no group is. Raises as `nodes.read_group`."""
    return nodes.read_group(_reader(store, location), location)


def is_array(store: Store, location: str) -> bool:
    """Whether an array, and no group, is at the root of a store."""
    node = read_node(_reader(store, location), "", location)
    return node is not None and node[0] == "array"


def open_array(store: Store, name: str, location: str) -> zarr.Array[Any] | None:
    """Open array `name` of the root group; None where nothing has that name.

    Raises IntegrityError where its metadata is damaged, ProblemError where it is a group or stored in ways not read.
    """
    node = read_node(_reader(store, location), name, location)
    if node is None:
        return None
    kind, found = node
    if kind != "array":
        raise ProblemError(f"{name!r} in {location} is a group: expected an array [B, H, N, D] or [H, N, D]")
    return _array(store, name, found, node_name(name, location))


def open_consolidated(
    store: Store, group: Mapping[str, Any], names: Iterable[str], location: str
) -> dict[str, zarr.Array[Any]]:
    """Open arrays as the consolidated metadata of `group`, the root, has them. Raises as `open_array`."""
    found = _read_consolidated(store, group, location)
    described = f"in the consolidated metadata of {location}"
    return {
        name: _array(store, name, found[name], f"array {name!r} {described}")
        for name in names
        if isinstance(found.get(name), dict)
    }


def _read_consolidated(store: Store, group: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The consolidated metadata of a group, by path; empty where there is none."""
    if group["zarr_format"] == 3:
        return _metadata_in(group.get("consolidated_metadata"))
    try:
        found = _metadata_in(read_document(_reader(store, location), "", ".zmetadata", location))
    except RemoteDeniedError:  # said of what is missing, too
        return {}
    arrays = {key.removesuffix("/.zarray"): node for key, node in found.items() if key.endswith("/.zarray")}
    return {
        path: {**node, "attributes": found.get(f"{path}/.zattrs", {})}
        for path, node in arrays.items()
        if isinstance(node, dict)
    }


def _metadata_in(consolidated: object) -> dict[str, Any]:
    found = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    return found if isinstance(found, dict) else {}


def _array(store: Store, name: str, found: dict[str, Any], described: str) -> zarr.Array[Any]:
    """The array that metadata describe."""
    attributes_of(found, described)
    (_check_v3 if found.get("zarr_format") == 3 else _check_v2)(found, described)
    try:
        with no_warnings():  # of codecs outside the specification, of a fill value that overflows
            return array_at(store, name, parse_metadata(found))
    except MemoryError:
        raise
    except Exception as error:  # Zarr has many
        raise ProblemError(f"{described} cannot be opened by zarr {zarr.__version__}: {error}; write it again") from error


def describe_array(array: zarr.Array[Any]) -> dict[str, Any]:
    """What an array is, as JSON-ready values."""
    return {"shape": list(array.shape), "dtype": array.dtype.name, "chunks": list(array.chunks)}


def array_names(store: Store) -> list[str]:
    """Names of some arrays in the root group, for a message. The first thousand entries are looked at."""
    try:
        with name_failure("list", getattr(store, "root", store)):
            return sync(_some_arrays(store)) if store.supports_listing else []
    except Exception:
        if isinstance(store, LocalStore):
            raise
        return []  # it cannot list


async def _some_arrays(store: Store) -> list[str]:
    found, seen = [], 0
    async for entry in store.list_dir(""):
        name, seen = entry.rstrip("/"), seen + 1
        if await store.exists(f"{name}/zarr.json") or await store.exists(f"{name}/.zarray"):
            found.append(name)
        if seen == MOST_ENTRIES:
            break
    return sorted(found)


def _reader(store: Store, location: str) -> Read:
    """How the documents of a store are read, with a bound."""
    if isinstance(store, LocalStore):
        return partial(read_in_folder, store.root)
    return partial(_read, store, location)


def _read(store: Store, location: str, key: str) -> bytes | None:
    found = sync(read_start(store, key, MOST_BYTES + 1))
    if found is not None and len(found) > MOST_BYTES:
        raise damaged_metadata(location, f"{key} has more than {MOST_BYTES:,} bytes")
    return found


def _check_v3(found: Mapping[str, Any], array: str) -> None:
    data_type = found.get("data_type")
    if not isinstance(data_type, str) or data_type not in _V3_TYPES:
        raise _unknown_type(array, data_type)
    itemsize = _V3_TYPES[data_type]
    grid = _configuration(found, "chunk_grid", ("regular",), array)
    chunk = _check_extents(found.get("shape"), grid.get("chunk_shape"), itemsize, array)
    separator = _configuration(found, "chunk_key_encoding", ("default", "v2"), array).get("separator", ".")
    if separator not in (".", "/"):
        raise damaged_metadata(array, "the separator of its chunk keys is neither . nor /")
    if found.get("storage_transformers"):
        raise ProblemError(f"{array} has storage transformers: these are not read; write it again without them")
    chain_of(v3_codecs(found.get("codecs"), array), chunk, itemsize, array)


def _check_v2(found: Mapping[str, Any], array: str) -> None:
    data_type = found.get("dtype")
    if data_type == "bfloat16":
        raise ProblemError(
            f"{array} has dtype bfloat16 in Zarr format 2, as TensorStore writes it: expected Zarr format 3, for Zarr reads "
            "no such array; write it again in format 3 (TensorStore's driver zarr3)"
        )
    match = _V2_TYPE.fullmatch(data_type) if isinstance(data_type, str) else None
    if match is None:
        raise _unknown_type(array, data_type)
    itemsize = int(match[2])
    chunk = _check_extents(found.get("shape"), found.get("chunks"), itemsize, array)
    if found.get("dimension_separator", ".") not in (".", "/") or found.get("order") not in ("C", "F"):
        raise damaged_metadata(array, "its order or the separator of its chunk keys is not one of Zarr's")
    chain_of(v2_codecs(found.get("filters"), found.get("compressor"), array), chunk, itemsize, array)


def _unknown_type(array: str, found: object) -> ProblemError:
    shown = f"{printable(found if isinstance(found, str) else repr(found)):.80}"
    return ProblemError(
        f"{array} cannot be opened: it has dtype {shown}, expected one of float16, bfloat16, float32; convert it first"
    )


def _configuration(found: Mapping[str, Any], field: str, names: tuple[str, ...], array: str) -> Mapping[str, Any]:
    """The configuration of an extension point of Zarr v3 with a known name."""
    value = found.get(field)
    if not isinstance(value, dict) or not isinstance(value.get("configuration", {}), dict):
        raise damaged_metadata(array, f"its {field} is no object with a name and a configuration")
    name = value.get("name")
    if name not in names:
        shown = f"{printable(repr(name)):.80}"
        raise ProblemError(f"{array} has the {field} {shown}: expected {' or '.join(names)}; write it again")
    return dict(value.get("configuration", {}))


def _check_extents(found_shape: object, found_chunk: object, itemsize: int, array: str) -> list[int]:
    """The chunk shape, once it and the shape are checked. Zarr divides by the one and multiplies with the other."""
    shape = _sizes("shape", found_shape, 0, array)
    chunk = _sizes("chunk shape", found_chunk, 1, array)
    if len(shape) != len(chunk):
        raise damaged_metadata(array, f"its shape {shape} and its chunk shape {chunk} have different ranks")
    if math.prod(chunk) * itemsize > MOST_CHUNK_BYTES or math.prod(shape) * itemsize > MOST_ARRAY_BYTES:
        raise ProblemError(
            f"{array} has shape {shape} and chunk shape {chunk}: expected chunks of at most {MOST_CHUNK_BYTES:,} bytes, and "
            f"{MOST_ARRAY_BYTES:,} in all"
        )
    return chunk


def _sizes(what: str, found: object, least: int, array: str) -> list[int]:
    if not isinstance(found, list) or len(found) > MOST_DIMENSIONS:
        raise damaged_metadata(
            array, f"its {what} is {printable(repr(found)[:80])}, expected a list of up to {MOST_DIMENSIONS} sizes"
        )
    if not all(type(size) is int and least <= size <= MOST_EXTENT for size in found):
        raise ProblemError(
            f"{array} has the {what} {printable(repr(found)[:200])}: expected whole numbers from {least} to {MOST_EXTENT:,}"
        )
    return found
