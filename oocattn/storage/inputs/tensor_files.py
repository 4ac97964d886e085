"""Tensors in .npy, .safetensors and .pt files, read in parts.

A file is opened without being loaded and without running what it may carry (.npy and .safetensors hold none, torch's
weights_only=True keeps it from running). What is found is where its numbers lie; direct.py reads them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from numpy.lib import format as npy

from oocattn.errors import OocattnError, ProblemError
from oocattn.records import Count, Excerpt, from_json, parse_json
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import read_exactly
from oocattn.storage.inputs.file_tensor import FILE_DTYPES, FileTensor, only_tensor, open_whole, pick, stamp_of, unsupported
from oocattn.storage.inputs.torch_files import open_torch
from oocattn.storage.layout import strides_of
from oocattn.storage.locations import describe, is_file_name, parse_location
from oocattn.text import printable

_SUFFIX = re.compile(r"(?<=.)\.(?:npy|safetensors|safetensors\.index\.json|pt|pth)(?=\Z|:.)", re.DOTALL)
_MOST_EXTENT = 1 << 48  # of one dimension
_MOST_HEADER = 100 << 20  # bytes of the header of a safetensors file, as its format has it


@dataclass(frozen=True)
class _Entry(Excerpt):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


def named_file(text: str) -> tuple[str, str | None] | None:
    """The file and the tensor that FILE or FILE:TENSOR names; None where it names none that `open_tensor_file` opens.

    Either may have a colon and a suffix in its name: then the longest file that is there is meant, and else the shortest.
    """
    found = [(text[: match.end()], text[match.end() + 1 :] or None) for match in _SUFFIX.finditer(text)]
    if len(found) < 2:
        return found[0] if found else None
    return next((each for each in reversed(found) if _is_there(each[0])), found[0])


def _is_there(file: str) -> bool:
    with suppress(ProblemError):
        path = parse_location(file).path
        return path is not None and os.path.lexists(path)
    return False


def open_tensor_file(name: str, typed: object) -> FileTensor:
    """Open FILE.npy, FILE.safetensors or FILE.pt, the last two with `:TENSOR`, for array `name`. Raises ProblemError."""
    if not isinstance(typed, str | os.PathLike):
        raise ProblemError(
            f"{name}: found {describe(typed)}, expected the path of a file: save the tensor with torch.save or numpy.save, "
            "and name FILE.pt, FILE.npy or FILE.safetensors"
        )
    file = os.fsdecode(typed)
    found = named_file(file)
    if found is None:
        raise ProblemError(f"{name}: {file} is not understood: expected FILE.npy, FILE.safetensors or FILE.pt[:TENSOR]")
    path, tensor = parse_location(found[0]).path, found[1]
    if path is None:
        raise ProblemError(f"{name}: {file} is a URL: tensors are read from local files; copy it first")
    return open_tensor_in(name, path, tensor)


def open_tensor_in(name: str, path: Path, tensor: str | None) -> FileTensor:
    """Open a tensor in a file, the one called `tensor` if that is given, for array `name`. Raises ProblemError."""
    try:
        if path.suffix == ".json":
            return open_checkpoint(name, path, tensor)
        if path.suffix != ".npy":
            return (open_safetensors if path.suffix == ".safetensors" else open_torch)(name, path, tensor)
        found = open_npy(name, path)
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{name}: there is no file {path}") from None
    if tensor is not None:
        raise only_tensor(name, path, tensor)
    if found.dtype.str[1:] in ("V2", "u2"):
        raise ProblemError(
            f"{name}: {path} has dtype {found.dtype}: .npy cannot say bfloat16, if that is what it holds; "
            "save it as .safetensors or .pt, or as float32"
        )
    return found


def open_npy(name: str, path: Path) -> FileTensor:
    """The array in a .npy file that is to become array `name`. Raises ProblemError for one that is not understood."""
    try:
        with open_whole(name, path) as descriptor, name_failure("read", path), open(descriptor, "rb", closefd=False) as file:
            readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            version = npy.read_magic(file)
            if version not in readers:
                raise ValueError(f"it has version {version} of the format")
            shape, columns_first, dtype = readers[version](file)
            offset, stamp = file.tell(), stamp_of(descriptor, path)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if not all(type(size) is int and 0 <= size <= _MOST_EXTENT for size in shape):
            raise ValueError(f"it would have the shape {list(shape)!r:.80}")
        needed = offset + math.prod(shape) * dtype.itemsize
        if stamp[0] < needed:
            raise ValueError(f"it has {stamp[0]:,} bytes of {needed:,}")
    except (OocattnError, OSError, MemoryError):
        raise
    except Exception as error:  # of a header that NumPy did not write it has many
        reason = printable(str(error).partition("\n")[0]).rstrip(".")  # its advice, which follows, is to its own callers
        raise ProblemError(
            f"{name}: {path} cannot be mapped to an array of numbers ({reason}): save one plain array with numpy.save"
        ) from error
    strides = strides_of(shape[::-1], dtype.itemsize)[::-1] if columns_first else strides_of(shape, dtype.itemsize)
    return FileTensor(path, "", shape, dtype, offset, strides, stamp)


def open_safetensors(name: str, path: Path, tensor: str | None) -> FileTensor:
    """The tensor in a .safetensors file that is to become array `name`.

    It is called `tensor`, if that is given. The format: 8 bytes that say how long the header is, the header, which is JSON,
    and the elements of the tensors (https://github.com/huggingface/safetensors). Raises ProblemError for anything else.
    """
    try:
        with open_whole(name, path) as descriptor:
            stamp = stamp_of(descriptor, path)
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
        key = pick(name, path, tensor, list(entries))
        shape, (begin, end) = entries[key].shape, entries[key].data_offsets
        dtype = FILE_DTYPES.get(entries[key].dtype, entries[key].dtype)
        if dtype not in FILE_DTYPES.values():
            raise unsupported(name, f"{path}:{key}", dtype)
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
        with open_whole(name, path) as descriptor:
            files = from_json(_Index, parse_json(read_exactly(descriptor, _MOST_HEADER, 0, path))).weight_map
    except ProblemError:
        raise
    except ValueError as error:
        raise ProblemError(f"{name}: {path} is not the index of a checkpoint in safetensors: {error}") from error
    key = pick(name, path, tensor, list(files))
    says, file = f"{name}: {path} says that {key} is in {printable(files[key])!r:.80}", files[key]
    if not (file.endswith(".safetensors") and is_file_name(file)):
        raise ProblemError(f"{says}: expected the name of a .safetensors file beside it")
    try:
        return open_safetensors(name, path.with_name(file), key)
    except FileNotFoundError:
        raise ProblemError(f"{says}, but there is no file of that name beside it: expected one; copy it there") from None
