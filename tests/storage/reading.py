"""Arrays of every kind of storage, and buffers to read them into: what tests of readers share."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

import oocattn.storage.bfloat16  # noqa: F401  registers the data type
from oocattn.storage.inputs.codecs import CodecReader
from oocattn.storage.inputs.direct import Reader
from oocattn.storage.inputs.parts import group_parts
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.layout import ChunkFiles
from oocattn.storage.mapped_store import MappedStore

CODECS = {"none": None, "zstd": ZstdCodec(), "blosc": BloscCodec(), "gzip": GzipCodec(level=1)}


V2_CODECS = {"none": None, "zstd": {"id": "zstd"}, "blosc": {"id": "blosc"}, "gzip": {"id": "gzip", "level": 1}}


DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("float32")}


def write(store: Any, data: np.ndarray, name: str = "q", **storage: Any) -> zarr.Array:
    """Write `data` as array `name` of a group in `store`, uncompressed unless asked otherwise."""
    zarr_format = storage.pop("zarr_format", 3)
    group = zarr.open_group(store, mode="a", zarr_format=zarr_format)
    storage = {"compressors": None, **storage}
    array = group.create_array(name, shape=data.shape, dtype=data.dtype, **storage)
    array[...] = data
    return array


def opened(root: Path, name: str = "q") -> ZarrSource:
    group = zarr.open_group(MappedStore(root, read_only=True), mode="r")
    return ZarrSource(name, group[name], str(root))


def read_files(read: Reader, array: ZarrSource, batch: int, head: int, start: int, stop: int, out: np.ndarray) -> None:
    """Read rows of an array from its chunk files."""
    files = ChunkFiles(array.array, array.array.store.root, "the dataset", array.axes)
    read(group_parts([(files.parts(batch, head, start, stop), out)]))


def decode(array: ZarrSource, batch: int, head: int, start: int, stop: int, out: np.ndarray) -> None:
    """Read rows of an array through Zarr's codecs."""
    CodecReader(array.array, "the dataset", array.axes).read(batch, [head], start, stop, [out])


def random_data(shape: tuple[int, ...], dtype: str = "float16") -> np.ndarray:
    bits = np.random.default_rng(0).integers(1, 256, (*shape, DTYPES[dtype].itemsize), dtype=np.uint8)
    return bits.view(DTYPES[dtype])[..., 0]  # any bits, NaNs among them, but no zero: zero chunks are not written


def buffer_for(array: ZarrSource, rows: int) -> np.ndarray:
    return np.ones((rows, *array.row_shape), array.dtype)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
