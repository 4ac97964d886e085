"""The same tensors as every kind of source that a run takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask.array
import fsspec
import numpy as np
import safetensors.numpy
import torch
import zarr
from numpy.typing import NDArray
from support import numpy_type
from zarr.storage import FsspecStore, MemoryStore, ObjectStore, ZipStore

Tensor = NDArray[Any]


@dataclass(frozen=True)
class Place:
    """Where a kind of source is made: a folder, and the layout of the tensors."""

    folder: Path
    layout: str

    def chunks(self, stored: Tensor) -> tuple[int, ...]:
        """Chunks of 16 tokens and of some of everything else."""
        extents = {"b": 1, "h": 2, "n": 16, "3": 2, "f": 24}
        return tuple(min(size, extents.get(axis, size)) for axis, size in zip(self.layout, stored.shape, strict=True))

    def array(self, store: Any, name: str, stored: Tensor, **options: Any) -> Any:
        """An array of Zarr in a store."""
        return zarr.create_array(
            store, name=name, shape=stored.shape, dtype=stored.dtype, chunks=self.chunks(stored), **options
        )


def _zarr(place: Place, name: str, stored: Tensor, store: Any, **options: Any) -> Any:
    array = place.array(store, name, stored, **options)
    array[...] = stored
    return array


def _path_of_plain_array(place: Place, name: str, stored: Tensor) -> Path:
    _zarr(place, name, stored, place.folder / "plain.zarr", compressors=None)
    return place.folder / "plain.zarr" / name


def _alone(place: Place, name: str, stored: Tensor) -> str:
    _zarr(place, "", stored, place.folder / f"alone_{name}.zarr")
    return str(place.folder / f"alone_{name}.zarr")


def _format_2(place: Place, name: str, stored: Tensor) -> Any:
    return _zarr(place, name, stored, place.folder / "v2.zarr", zarr_format=2, order="F")


def _sharded(place: Place, name: str, stored: Tensor) -> Any:
    shards = tuple(-(-size // chunk) * chunk for size, chunk in zip(stored.shape, place.chunks(stored), strict=True))
    return _zarr(place, name, stored, place.folder / "sharded.zarr", shards=shards)


def _zip(place: Place, name: str, stored: Tensor) -> Any:
    with ZipStore(place.folder / f"{name}.zip", mode="w") as store:
        _zarr(place, f"inner/{name}", stored, store)
    return zarr.open_array(ZipStore(place.folder / f"{name}.zip", mode="r"), path=f"inner/{name}", mode="r")


def _fsspec(place: Place, name: str, stored: Tensor) -> Any:
    return _zarr(place, name, stored, FsspecStore.from_url(f"memory://{place.folder.name}"))


def _url(place: Place, name: str, stored: Tensor) -> str:
    _zarr(place, name, stored, FsspecStore.from_url(f"memory://url_{place.folder.name}"))
    return f"memory://url_{place.folder.name}/{name}"


def _object_store(place: Place, name: str, stored: Tensor) -> Any:
    import obstore

    return _zarr(place, name, stored, ObjectStore(obstore.store.LocalStore(place.folder / "objects", mkdir=True)))


def _icechunk(place: Place, name: str, stored: Tensor) -> Any:
    import icechunk

    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    return _zarr(place, name, stored, repository.writable_session("main").store)


def _npy(place: Place, name: str, stored: Tensor) -> Path:
    np.save(place.folder / f"{name}.npy", stored)
    return place.folder / f"{name}.npy"


def _npy_in_columns(place: Place, name: str, stored: Tensor) -> Path:
    np.save(place.folder / f"{name}_columns.npy", np.asfortranarray(stored))
    return place.folder / f"{name}_columns.npy"


def _safetensors(place: Place, name: str, stored: Tensor) -> str:
    safetensors.numpy.save_file({"model.weight": stored, "other": np.ones(3)}, place.folder / f"{name}.safetensors")
    return f"{place.folder / name}.safetensors:model.weight"


def _checkpoint(place: Place, name: str, stored: Tensor) -> str:
    """In the second of two shards of one index."""
    shards = {f"layer.{part}": f"{name}-{part}-of-2.safetensors" for part in (1, 2)}
    for key, shard in shards.items():
        content = stored if key == "layer.2" else stored[:1]
        safetensors.numpy.save_file({key: np.ascontiguousarray(content)}, place.folder / shard)
    index = place.folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return f"{index}:layer.2"


def _pt(place: Place, name: str, stored: Tensor) -> str:
    torch.save({"a": torch.ones(2), "tensor": as_torch(stored)}, place.folder / f"{name}.pt")
    return f"{place.folder / name}.pt:tensor"


def _mapped(place: Place, name: str, stored: Tensor) -> Any:
    return np.load(_npy(place, name, stored), mmap_mode="r")


def _mapped_raw(place: Place, name: str, stored: Tensor) -> Any:
    path = place.folder / f"{name}.bin"
    path.write_bytes(b"\1" * 13 + np.concatenate([stored, stored]).tobytes())
    whole = np.memmap(path, stored.dtype, "r", 13, (2 * stored.shape[0], *stored.shape[1:]))
    return whole[stored.shape[0] :]


def _transposed(place: Place, name: str, stored: Tensor) -> Tensor:
    return np.ascontiguousarray(stored[..., ::-1].T).T[..., ::-1]


def _tensor_in_parts(place: Place, name: str, stored: Tensor) -> torch.Tensor:
    return torch.stack([as_torch(stored), as_torch(stored)], -1)[..., 0]


def _dask(place: Place, name: str, stored: Tensor) -> Any:
    return dask.array.from_array(stored, chunks=place.chunks(stored)) * stored.dtype.type(1)


def _persisted(place: Place, name: str, stored: Tensor) -> Any:
    return _dask(place, name, stored).persist(scheduler="synchronous")


def _data_array(place: Place, name: str, stored: Tensor) -> Any:
    import xarray

    dims = {"b": "batch", "h": "head", "n": "token", "d": "dim", "3": "which", "f": "feature"}
    return xarray.DataArray(stored, dims=[dims[axis] for axis in place.layout])


def as_torch(stored: Tensor) -> torch.Tensor:
    """The same numbers as a tensor."""
    if stored.dtype == numpy_type("bfloat16"):
        return torch.from_numpy(stored.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


KINDS: dict[str, Callable[[Place, str, Tensor], Any]] = {
    "path of a plain array": _path_of_plain_array,
    "path of an array alone": _alone,
    "array in a folder": lambda place, name, stored: _zarr(place, name, stored, place.folder / "zarr.zarr"),
    "array of format 2": _format_2,
    "array in shards": _sharded,
    "array in memory": lambda place, name, stored: _zarr(place, name, stored, MemoryStore()),
    "array in a zip": _zip,
    "array in fsspec": _fsspec,
    "array in an ObjectStore": _object_store,
    "array in Icechunk": _icechunk,
    "URL": _url,
    "npy": _npy,
    "npy in columns": _npy_in_columns,
    "safetensors": _safetensors,
    "checkpoint": _checkpoint,
    "pt": _pt,
    "map of npy": _mapped,
    "map of anything": _mapped_raw,
    "numpy": lambda place, name, stored: stored,
    "numpy, big-endian": lambda place, name, stored: stored.astype(stored.dtype.newbyteorder(">")),
    "numpy, backwards": _transposed,
    "torch": lambda place, name, stored: as_torch(stored),
    "torch, in parts": _tensor_in_parts,
    "dask": _dask,
    "dask, persisted": _persisted,
    "xarray": _data_array,
}

NEEDED = {"xarray": "xarray", "array in an ObjectStore": "obstore", "array in Icechunk": "icechunk"}
"""The packages that kinds need, which may be missing."""

NOT_BFLOAT16 = {"npy", "npy in columns", "map of npy", "numpy, big-endian", "array of format 2"}
"""Kinds that cannot say bfloat16."""

LAYOUTS = ("bhnd", "bnhd", "hnd", "nhd", "bn3hd", "n3hd", "bnf", "nf")


def stored_tensors(layout: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The tensors of one batch entry or more, [B, H, N, D], as a layout has them."""
    if "3" not in layout and "f" not in layout:
        order = ["bhnd".index(axis) for axis in layout]
        tensors = {"q": q, "k": k, "v": v}
        whole = {name: tensor if "b" in layout else tensor[0] for name, tensor in tensors.items()}
        return {
            name: np.ascontiguousarray(each.transpose([at - ("b" not in layout) for at in order]))
            for name, each in whole.items()
        }
    rows = [tensor.transpose(0, 2, 1, 3) for tensor in (q, k, v)]
    features = [each.reshape(*each.shape[:2], -1) for each in rows]
    packed = np.concatenate(features, 2) if "f" in layout else np.stack(rows, 2)
    return {"qkv": np.ascontiguousarray(packed if "b" in layout else packed[0])}


def exists(kind: str, layout: str, dtype: str) -> bool:
    """Whether there are tensors of this kind, layout and dtype."""
    if kind in NEEDED and find_spec(NEEDED[kind]) is None:
        return False
    return not (dtype == "bfloat16" and kind in NOT_BFLOAT16)


def forget(folder: Path) -> None:
    """Remove what was put in fsspec's memory."""
    files = fsspec.filesystem("memory")
    for name in (folder.name, f"url_{folder.name}"):
        if files.exists(f"/{name}"):
            files.rm(f"/{name}", recursive=True)
