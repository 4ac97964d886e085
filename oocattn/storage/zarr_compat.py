"""Zarr's private and moving parts, for every version that this package runs with: only this module imports them.

What others use of Zarr is `zarr`, `zarr.codecs` and `zarr.storage`.
"""

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
from zarr.storage import StorePath

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # zarr 3.1
    from zarr.dtype import DataTypeValidationError  # type: ignore[no-redef, attr-defined, unused-ignore]

__all__ = [
    "JSON",
    "ArraySpec",
    "ArrayV3Metadata",
    "Buffer",
    "BufferPrototype",
    "ByteRequest",
    "BytesBytesCodec",
    "DTypeJSON",
    "DataTypeValidationError",
    "DefaultChunkKeyEncoding",
    "HasEndianness",
    "HasItemSize",
    "NDBuffer",
    "OffsetByteRequest",
    "RangeByteRequest",
    "Store",
    "SuffixByteRequest",
    "ZDType",
    "ZarrFormat",
    "array_at",
    "buffer_prototype",
    "data_type_registry",
    "default_buffer_prototype",
    "parse_metadata",
    "sync",
]


def parse_metadata(document: dict[str, Any]) -> Any:
    """The metadata object of an array's JSON document, of Zarr format 2 or 3. Raises whatever Zarr raises."""
    kind: Any = ArrayV3Metadata if document.get("zarr_format") == 3 else ArrayV2Metadata
    return kind.from_dict(document)


def array_at(store: Store, path: str, metadata: Any) -> zarr.Array[Any]:
    """The array with this metadata object at a path of a store, of which nothing is read."""
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=StorePath(store, path)))


import_module("oocattn.storage.bfloat16")  # with the names above; registers the data type, whoever imports Zarr through here
