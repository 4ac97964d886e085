"""Tensors in .npy, .safetensors and .pt files, read in parts.

A file is opened without being loaded and without running what it may carry (.npy and .safetensors hold none, torch's
weights_only=True keeps it from running). What is found is where its numbers lie; direct.py reads them.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
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
from oocattn.storage.files.regular import open_regular, read_exactly
from oocattn.storage.inputs.direct import DirectReader
from oocattn.storage.inputs.parts import Part, TensorFile, make_part
from oocattn.storage.layout import strides_of
from oocattn.storage.locations import describe, parse_location
from oocattn.text import printable

if TYPE_CHECKING:
    import torch

_FILE_AND_TENSOR = re.compile(r"(.+\.(?:npy|safetensors|safetensors\.index\.json|pt|pth))(?::(.+))?")
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
    """A tensor in a file: elements at `offset`, `strides` bytes apart. `stamp` is of the file when it was opened.

    `key` is its name in the file, "" where the file has one tensor without a name.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    strides: tuple[int, ...]
    stamp: tuple[int, int]

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.path}:{self.key}" if self.key else str(self.path)

    def file(self, label: str) -> TensorFile:
        """The file that it lies in. Messages call the tensor `label`."""
        return TensorFile(self.path, label, self.stamp)

    def part(self, selection: Sequence[slice], file: TensorFile) -> Part:
        """The elements of a selection, a slice for each axis, of which none is empty, in its `file`."""
        spans = [range(*each.indices(size)) for each, size in zip(selection, self.shape, strict=True)]
        offset = self.offset + sum(span.start * stride for span, stride in zip(spans, self.strides, strict=True))
        return make_part(file, offset, [len(span) for span in spans], self.strides, self.dtype)

    def read(self, selection: Sequence[slice]) -> NDArray[Any]:
        """A selection of it, a slice for each axis, in native byte order.

        Raises IntegrityError where the file is not what it was when it was opened.
        """
        shape = [len(range(*each.indices(size))) for each, size in zip(selection, self.shape, strict=True)]
        out = np.empty(shape, self.dtype.newbyteorder("="))
        if out.size:
            DirectReader().read([([self.part(selection, self.file(self.label))], out)])
        return out


def is_tensor_file(text: str) -> bool:
    """Whether a text names a file that `open_tensor_file` opens."""
    return _FILE_AND_TENSOR.fullmatch(text) is not None


def open_tensor_file(name: str, typed: object) -> FileTensor:
    """Open FILE.npy, FILE.safetensors or FILE.pt, the last two with `:TENSOR`, for array `name`. Raises ProblemError."""
    if not isinstance(typed, str | os.PathLike):
        raise ProblemError(
            f"{name}: found {describe(typed)}, expected the path of a file: save the tensor with torch.save or numpy.save, "
            "and name FILE.pt, FILE.npy or FILE.safetensors"
        )
    file = os.fsdecode(typed)
    match = _FILE_AND_TENSOR.fullmatch(file)
    if match is None:
        raise ProblemError(f"{name}: {file} is not understood: expected FILE.npy, FILE.safetensors or FILE.pt[:TENSOR]")
    path, tensor = parse_location(match[1]).path, match[2]
    if path is None:
        raise ProblemError(f"{name}: {file} is a URL: tensors are read from local files; copy it first")
    try:
        if path.suffix == ".json":
            return open_checkpoint(name, path, tensor)
        if path.suffix != ".npy":
            return (open_safetensors if path.suffix == ".safetensors" else open_torch)(name, path, tensor)
        found = open_npy(name, path)
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{name}: there is no file {path}") from None
    if found.dtype.str[1:] in ("V2", "u2"):
        raise ProblemError(
            f"{name}: {path} has dtype {found.dtype}: .npy cannot say bfloat16, if that is what it holds; "
            "save it as .safetensors or .pt, or as float32"
        )
    return found


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
    strides = strides_of(shape[::-1], dtype.itemsize)[::-1] if columns_first else strides_of(shape, dtype.itemsize)
    return FileTensor(path, "", shape, dtype, offset, strides, stamp)


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
    return FileTensor(path, key, shape, numbers, 8 + length + begin, strides_of(shape, numbers.itemsize), stamp)


@dataclass(frozen=True)
class _Index(Excerpt):
    """What the index of a checkpoint in several files says: the file of each tensor, beside it."""

    weight_map: Mapping[str, str]


def open_checkpoint(name: str, path: Path, tensor: str | None) -> FileTensor:
    """The tensor of a checkpoint in several .safetensors files, by its index, that is to become array `name`.

    It is called `tensor`, if that is given. The format is that of Hugging Face's libraries: JSON with a `weight_map`. Raises
    ProblemError for anything else, also for a file that does not lie beside the index.
    """
    try:
        with open_regular(path) as descriptor:
            files = from_json(_Index, parse_json(read_exactly(descriptor, _MOST_HEADER, 0, path))).weight_map
    except ValueError as error:
        raise ProblemError(f"{name}: {path} is not the index of a checkpoint in safetensors: {error}") from error
    key = _pick(name, path, tensor, list(files))
    if not files[key].endswith(".safetensors") or "/" in files[key] or "\0" in files[key]:
        raise ProblemError(
            f"{name}: {path} says that {key} is in {printable(files[key])!r:.80}: expected the name of a .safetensors file "
            "beside it"
        )
    return open_safetensors(name, path.with_name(files[key]), key)


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
    label, key = str(path), ""
    if isinstance(found, dict):
        key = _pick(name, path, tensor, [key for key in found if isinstance(key, str)])
        found, label = found[key], f"{path}:{key}"
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        raise ProblemError(f"{name}: {label} is a {type(found).__name__}: expected a dense tensor")
    if found.is_neg():  # torch keeps a negation beside the elements
        raise ProblemError(f"{name}: {label} is the negative of what is stored: save tensor.resolve_neg()")
    return _torch_tensor(name, path, key, label, found, stamp)


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


def _torch_tensor(name: str, path: Path, key: str, label: str, found: torch.Tensor, stamp: tuple[int, int]) -> FileTensor:
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
    return FileTensor(path, key, tuple(found.shape), numbers, offset, strides, stamp)


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
