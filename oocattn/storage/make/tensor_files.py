"""Tensors in .npy, .safetensors and .pt files, read in parts.

A file is opened without being loaded and without running what it may carry (.npy and .safetensors hold none, torch's
weights_only=True keeps it from running). It is read, not mapped: a mapped file that is cut short ends the process. Only
elements that lie scattered are copied from a map, if there can be one, for the time of one read.
"""

from __future__ import annotations

import math
import mmap
import os
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from oocattn.errors import OocattnError, ProblemError
from oocattn.records import Count, Excerpt, from_json, parse_json
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import map_file, open_regular, read_exactly

if TYPE_CHECKING:
    import torch

STEP_BYTES = 4 << 20
"""Bytes of a file that are read at a time, at most, also where most of them lie between those that are wanted."""

_MOST_EXTENT = 1 << 48  # of one dimension
_MOST_HEADER = 100 << 20  # bytes of the header of a safetensors file, as its format has it
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class _Entry(Excerpt):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: elements at `offset`, `strides` bytes apart. `stamp` is of the file when it was opened."""

    path: Path
    label: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    strides: tuple[int, ...]
    stamp: tuple[int, int]

    def read(self, part: Sequence[slice]) -> NDArray[Any]:
        """A part of it, a slice for each axis. Raises ProblemError where the file is short or was changed."""
        spans = [range(*each.indices(size)) for each, size in zip(part, self.shape, strict=True)]
        out = np.empty([len(span) for span in spans], self.dtype)
        first = [span.start for span in spans]
        with open_regular(self.path) as descriptor:
            if not self._copy_mapped(descriptor, out, first):
                self._read(descriptor, out, first)
            if _stamp(descriptor, self.path) != self.stamp:
                raise ProblemError(f"{self.label} was changed while it was read: import it again")
        return out

    def _span(self, shape: Sequence[int], first: Sequence[int]) -> tuple[int, int]:
        """Where a part of the tensor begins in the file, and its length in bytes."""
        begin = self.offset + sum(at * stride for at, stride in zip(first, self.strides, strict=True))
        last = sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        return begin, last + self.dtype.itemsize

    def _copy_mapped(self, descriptor: int, out: NDArray[Any], first: Sequence[int]) -> bool:
        """Copy scattered elements from a map; False where that does not apply."""
        begin, length = self._span(out.shape, first)
        if length < 2 * out.nbytes or _stamp(descriptor, self.path) != self.stamp:
            return False
        slack = begin % mmap.ALLOCATIONGRANULARITY
        mapped = map_file(descriptor, length + slack, begin - slack)
        if mapped is None:
            return False
        with mapped:
            out[...] = np.ndarray(out.shape, self.dtype, mapped, slack, self.strides)
        return True

    def _read(self, descriptor: int, out: NDArray[Any], first: Sequence[int]) -> None:
        """Read elements: at once where they lie close together, else in halves."""
        begin, length = self._span(out.shape, first)
        if out.size > 1 and length > STEP_BYTES:
            axis = max(range(out.ndim), key=lambda axis: (out.shape[axis] > 1) * self.strides[axis])
            half = out.shape[axis] // 2
            for low, high in ((0, half), (half, out.shape[axis])):
                within = tuple(slice(low, high) if each == axis else slice(None) for each in range(out.ndim))
                self._read(descriptor, out[within], [at + low * (each == axis) for each, at in enumerate(first)])
        elif out.size:
            content = read_exactly(descriptor, length, begin, self.path)
            if len(content) < length:
                raise ProblemError(f"{self.label} ends at byte {begin + len(content):,}: it is cut short; copy it again")
            out[...] = np.ndarray(out.shape, self.dtype, content, strides=self.strides)


def open_npy(name: str, path: Path) -> FileTensor:
    """The array in a .npy file that is to become array `name`. Raises ProblemError for one that is not understood."""
    try:
        with open_regular(path) as descriptor, name_failure("read", path), open(descriptor, "rb", closefd=False) as file:
            readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            version = npy.read_magic(file)
            if version not in readers:
                raise ValueError(f"it has version {version} of the format")
            shape, columns_first, dtype = readers[version](file)
            offset, stamp = file.tell(), _stamp(descriptor, path)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if not all(0 <= size <= _MOST_EXTENT for size in shape):
            raise ValueError(f"it would have the shape {list(shape)!r:.80}")
        needed = offset + math.prod(shape) * dtype.itemsize
        if stamp[0] < needed:
            raise ValueError(f"it has {stamp[0]:,} bytes of {needed:,}")
    except (OocattnError, OSError, MemoryError):
        raise
    except Exception as error:  # of a header that NumPy did not write it has many
        raise ProblemError(
            f"{name}: {path} cannot be mapped to an array of numbers ({error}): save one plain array with numpy.save"
        ) from error
    strides = _strides(shape[::-1], dtype)[::-1] if columns_first else _strides(shape, dtype)
    return FileTensor(path, str(path), shape, dtype, offset, strides, stamp)


def open_safetensors(name: str, path: Path, tensor: str | None) -> FileTensor:
    """The tensor in a .safetensors file that is to become array `name`.

    It is called `tensor`, if that is given. The format: 8 bytes that say how long the header is, the header, which is JSON,
    and the elements of the tensors (https://github.com/huggingface/safetensors). Raises ProblemError for anything else.
    """
    try:
        with open_regular(path) as descriptor:
            stamp = _stamp(descriptor, path)
            file_size = stamp[0]
            length = int.from_bytes(read_exactly(descriptor, 8, 0, path), "little")
            if not 2 <= length <= min(_MOST_HEADER, file_size - 8):
                raise ValueError(f"its header would have {length:,} bytes, and the file has {file_size:,}")
            header = parse_json(read_exactly(descriptor, length, 8, path))
        header.pop("__metadata__", None)
        entries = {key: from_json(_Entry, entry, key) for key, entry in header.items()}
        end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
        if 8 + length + end != file_size:
            raise ValueError(f"its tensors end at byte {8 + length + end:,}, and the file has {file_size:,}")
        key = _pick(name, path, tensor, list(entries))
        shape, (begin, end) = entries[key].shape, entries[key].data_offsets
        dtype = _SAFETENSORS_DTYPES.get(entries[key].dtype, entries[key].dtype)
        if dtype not in _SAFETENSORS_DTYPES.values():
            raise _unsupported(name, f"{path}:{key}", dtype)
        numbers = numpy_dtype(dtype).newbyteorder("<")
        if end - begin != math.prod(shape) * numbers.itemsize:
            raise ValueError(f"tensor {key!r} lies at bytes {begin} to {end}, which is no {dtype} {list(shape)}")
    except ProblemError:
        raise
    except ValueError as error:
        raise ProblemError(f"{name}: {path} is not a whole safetensors file: {error}") from error
    return FileTensor(path, f"{path}:{key}", shape, numbers, 8 + length + begin, _strides(shape, numbers), stamp)


def open_torch(name: str, path: Path, tensor: str | None) -> FileTensor:
    """The tensor in a file of torch.save that is to become array `name`.

    It is called `tensor`, if that is given. Its elements are not read: of a tensor without data torch says where in the file
    they lie. Raises ProblemError for a file of anything else than plain tensors.
    """
    import torch

    try:
        with open_regular(path) as descriptor, name_failure("read", path), open(descriptor, "rb", closefd=False) as file:
            stamp = _stamp(descriptor, path)
            _check_archive(name, path, file)
            with _without_data():
                found = torch.load(file, weights_only=True, map_location="meta")
    except (OocattnError, OSError, MemoryError):
        raise
    except Exception as error:  # of a file that torch did not write it has many
        raise ProblemError(
            f"{name}: {path} is not a file of plain tensors, as torch.save writes them: save one, or a dict of them"
        ) from error
    label = str(path)
    if isinstance(found, dict):
        key = _pick(name, path, tensor, [key for key in found if isinstance(key, str)])
        found, label = found[key], f"{path}:{key}"
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        raise ProblemError(f"{name}: {label} is a {type(found).__name__}: expected a dense tensor")
    if found.is_neg():  # torch keeps a negation beside the elements
        raise ProblemError(f"{name}: {label} is the negative of what is stored: save tensor.resolve_neg()")
    return _torch_tensor(name, path, label, found, stamp)


def _check_archive(name: str, path: Path, file: IO[bytes]) -> None:
    """Raise ProblemError where stored elements are compressed or swapped. torch hides the one, and crashes on the other."""
    if not zipfile.is_zipfile(file):  # torch says what it is
        file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ProblemError(f"{name}: {path} is compressed: load it, and save it again with torch.save")
        for each in archive.namelist():
            if each.rpartition("/")[2] == "byteorder" and archive.open(each).read(16) != b"little":
                raise ProblemError(
                    f"{name}: {path} has numbers of another byte order than little-endian: save it again on this machine"
                )
    file.seek(0)


def _without_data() -> AbstractContextManager[object]:
    """A context in which torch.load to "meta" reads no elements. Older versions need fake tensors for that."""
    import torch

    if hasattr(torch.serialization, "_is_meta_location"):
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _torch_tensor(name: str, path: Path, label: str, found: torch.Tensor, stamp: tuple[int, int]) -> FileTensor:
    """Where a tensor of torch's lies in its file."""
    begin = getattr(found.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise ProblemError(
            f"{name}: {label} is in the format of torch before 1.6: load it and save it again with this torch, as .pt"
        )
    dtype = str(found.dtype).removeprefix("torch.")
    if dtype not in _SAFETENSORS_DTYPES.values():
        raise _unsupported(name, label, dtype)
    numbers = numpy_dtype(dtype).newbyteorder("<")
    strides = tuple(stride * numbers.itemsize for stride in found.stride())
    offset = begin + int(found.storage_offset()) * numbers.itemsize
    return FileTensor(path, label, tuple(found.shape), numbers, offset, strides, stamp)


def _pick(name: str, path: Path, tensor: str | None, found: list[str]) -> str:
    """The key of the tensor meant: the named one, `name`, or the only one."""
    if tensor is None and len(found) == 1:
        return found[0]
    key = tensor or name
    if key not in found:
        some = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        raise ProblemError(f"{name}: {path} has no tensor {key!r}: name one as {path}:TENSOR; it holds {some or 'none'}")
    return key


def _unsupported(name: str, label: str, dtype: object) -> ProblemError:
    expected = ", ".join(_SAFETENSORS_DTYPES.values())
    return ProblemError(f"{name} ({label}) has dtype {dtype}: expected one of {expected}; convert it first")


def _stamp(descriptor: int, path: Path) -> tuple[int, int]:
    """Size and time of change of an open file."""
    with name_failure("look at", path):
        status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _strides(shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Bytes between neighbours along each axis, where the last one is contiguous."""
    return tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
