"""Zarr's private modules, for every version: only this module imports them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer.cpu import NDBuffer, buffer_prototype
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.chunk_key_encodings import DefaultChunkKeyEncoding
from zarr.core.common import JSON, ZarrFormat
from zarr.core.dtype.common import DTypeJSON, HasEndianness, HasItemSize
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata
from zarr.core.sync import sync
from zarr.dtype import ZDType, data_type_registry
from zarr.storage import StorePath, WrapperStore

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # zarr 3.1
    from zarr.dtype import DataTypeValidationError  # type: ignore[no-redef, attr-defined, unused-ignore]


def parse_metadata(document: dict[str, Any]) -> Any:
    """The metadata object of an array's JSON document, of format 2 or 3. Raises whatever Zarr raises."""
    kind: Any = ArrayV3Metadata if document.get("zarr_format") == 3 else ArrayV2Metadata
    return kind.from_dict(document)


def unwrapped(store: Store) -> Store:
    """What is in all wrappers of a store, or the store."""
    while isinstance(store, WrapperStore):
        store = store._store
    return store


def array_at(store: Store, path: str, metadata: Any) -> zarr.Array[Any]:
    """The array with this metadata at a path of a store; nothing is read."""
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=StorePath(store, path)))


import_module("oocattn.storage.bfloat16")  # with the names above; registers the data type, whoever imports Zarr through here
