"""A small array, written with any codecs and read back."""

from typing import Any

import numpy as np
import zarr

from oocattn.storage.inputs.dataset import Dataset

SHAPE, CHUNK = (1, 1, 64, 8), (1, 1, 16, 8)
DATA = np.random.default_rng(0).standard_normal(SHAPE).astype("float16")
CHUNK_BYTES = 256
MIB = 1 << 20


def write(store: Any, data: np.ndarray = DATA, **storage: Any) -> Any:
    """A dataset whose k and v are as stored as `q`, which Zarr writes."""
    group = zarr.open_group(store, mode="w", zarr_format=storage.pop("zarr_format", 3))
    for name in "qkv":
        group.create_array(name, shape=data.shape, dtype=data.dtype, **{"chunks": CHUNK, **storage})[...] = data
    return group


def read(where: Any) -> np.ndarray:
    array = Dataset.open(where).arrays["q"]
    out = np.empty((64, 8), array.dtype)
    array.read_rows(0, 0, 0, 64, out)
    return out
