"""Maps of files by NumPy, read as the files that they are."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from oocattn.errors import IntegrityError, OocattnError, ProblemError
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files.operations import name_failure
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.file_source import FileSource
from oocattn.storage.inputs.file_tensor import FileTensor
from oocattn.storage.inputs.origin import Numbers, Origin
from oocattn.storage.inputs.source import Opened, TensorSource
from oocattn.storage.inputs.tensor_files import open_npy
from oocattn.storage.inputs.values import check_dtype
from oocattn.storage.locations import describe
from oocattn.storage.remote.options import StorageOptions


class RawSource(FileSource):
    """Numbers in a file that does not say where they lie: a map of NumPy does."""

    def __init__(self, name: str, tensor: FileTensor, axes: Axes) -> None:
        super().__init__(name, tensor, axes)
        numbers = Numbers(_dtype_name(tensor.dtype), tensor.offset, tensor.shape, tensor.strides)
        self.origin = Origin("raw", str(tensor.path), "", axes, numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return RawSource, (self.name, self._tensor, self.axes)

    def reopen(self) -> TensorSource:
        """See `TensorSource.reopen`."""
        return open_raw(self.name, self.origin, self._tensor.path)


def open_raw(name: str, origin: Origin, path: Path) -> TensorSource:
    """The tensor of a record, in the file at `path`. Raises ProblemError where there is none, IntegrityError for a part."""
    assert origin.numbers is not None
    try:
        with name_failure("look at", path):
            dtype, status = _dtype_of(origin.numbers.dtype), os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{name}: there is no file {path}") from None
    stamp, numbers = (status.st_size, status.st_mtime_ns), origin.numbers
    if not len(numbers.shape) == len(numbers.strides) == len(origin.axes.order):
        raise IntegrityError(
            f"{name}: its record has shape {numbers.shape}, strides {numbers.strides} and the axes {origin.axes.order}: "
            "expected as many of each"
        )
    last = sum((size - 1) * stride for size, stride in zip(numbers.shape, numbers.strides, strict=True))
    end = numbers.offset + last + dtype.itemsize
    if status.st_size < end:
        raise IntegrityError(f"{name}: {path} has {status.st_size:,} bytes, expected at least {end:,}: it was cut short")
    return RawSource(name, FileTensor(path, "", numbers.shape, dtype, numbers.offset, numbers.strides, stamp), origin.axes)


def open_memmap(name: str, typed: object, _: StorageOptions | None = None) -> Opened | None:
    """A map of a file; None for anything else, or where what is mapped is not what is in the file."""
    if not isinstance(typed, np.memmap) or (tensor := _in_file(typed)) is None:
        return None
    label = f"{describe(typed)} of {tensor.path}"
    check_dtype(name, label, typed.dtype)
    try:
        whole = open_npy(name, tensor.path) if tensor.path.suffix == ".npy" else None
    except OocattnError:
        whole = None
    kind = FileSource if whole == tensor else RawSource
    return Opened(label, tensor.shape, lambda own, axes: kind(own, tensor, axes))


def _in_file(mapped: np.memmap[Any, Any]) -> FileTensor | None:
    """Where the elements of a map lie in its file; None where they lie backwards or repeatedly, or in another file now."""
    name, base = mapped.filename, getattr(mapped, "_mmap", None)
    if name is None or base is None or mapped.mode == "c" or not mapped.size or any(size <= 0 for size in mapped.strides):
        return None
    start = np.frombuffer(base, np.uint8).ctypes.data
    low, high = byte_bounds(mapped)
    first = mapped.offset - mapped.offset % mmap.ALLOCATIONGRANULARITY  # of the map, in the file
    path = Path(os.fsdecode(name)).absolute()
    try:
        status = path.stat()
        if not (start <= low and high <= start + len(base) and first + high - start <= status.st_size):
            return None
        if not _is_mapped(path, status, low):
            return None
    except OSError:
        return None
    stamp = (status.st_size, status.st_mtime_ns)
    return FileTensor(path, "", mapped.shape, mapped.dtype, first + low - start, mapped.strides, stamp)


def _is_mapped(path: Path, status: os.stat_result, address: int) -> bool:
    """Whether an address of this process is of the file at `path`, which may have been replaced since it was mapped.

    Linux alone says so, in /proc/self/maps: `low-high permissions offset major:minor inode path`. Some file systems (Btrfs,
    overlays) have another device there than in `status`: then the path decides, which ends in "(deleted)" once the file is
    replaced. Raises OSError on other systems.
    """
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            span, _, _, device, inode, *rest = line.rstrip(b"\n").split(maxsplit=5)
            low, high = (int(end, 16) for end in span.split(b"-"))
            if low <= address < high:
                major, minor = (int(number, 16) for number in device.split(b":"))
                same = os.makedev(major, minor) == status.st_dev or rest == [os.fsencode(path.resolve())]
                return int(inode) == status.st_ino and same
    return False


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.name == "bfloat16" else dtype.str


def _dtype_of(name: str) -> np.dtype[Any]:
    return numpy_dtype(name) if name == "bfloat16" else np.dtype(name)
