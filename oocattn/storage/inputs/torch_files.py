"""Tensors in files of torch.save. torch says where their elements lie, without reading them; nothing in the file is run."""

from __future__ import annotations

import errno
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from oocattn.errors import OocattnError, ProblemError
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files.operations import name_failure
from oocattn.storage.inputs.file_tensor import FILE_DTYPES, FileTensor, only_tensor, open_whole, pick, stamp_of, unsupported

if TYPE_CHECKING:
    import torch

_LOCAL_HEADER = 30  # bytes before each record of a zip archive, with the lengths of the name and of the field that follow


def open_torch(name: str, path: Path, tensor: str | None) -> FileTensor:
    """The tensor in a file of torch.save that is to become array `name`.

    It is called `tensor`, if that is given. Its elements are not read: of a tensor without data torch says where in the file
    they lie. Raises ProblemError for a file of anything else than plain tensors.
    """
    import torch

    try:
        with open_whole(name, path) as descriptor, name_failure("read", path), open(descriptor, "rb", closefd=False) as file:
            stamp = stamp_of(descriptor, path)
            records = _records(name, path, file)
            with _without_data():
                found = torch.load(file, weights_only=True, map_location="meta")
    except (OocattnError, MemoryError):
        raise
    except Exception as error:  # of a file that torch did not write it has many
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a seek to where no file is
            raise
        raise ProblemError(
            f"{name}: {path} is not a file of plain tensors, as torch.save writes them: save one, or a dict of them"
        ) from error
    label, key = str(path), ""
    if isinstance(found, dict):
        key = pick(name, path, tensor, [key for key in found if isinstance(key, str)])
        found, label = found[key], f"{path}:{key}"
    elif tensor is not None:
        raise only_tensor(name, path, tensor)
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        raise ProblemError(f"{name}: {label} is a {type(found).__name__}: expected a dense tensor")
    if found.is_neg():  # torch keeps a negation beside the elements
        raise ProblemError(f"{name}: {label} is the negative of what is stored: save tensor.resolve_neg()")
    begin = getattr(found.untyped_storage(), "_checkpoint_offset", None)
    if records is None or begin is None:
        reason = "is in the format of torch before 1.6: load it and save it again with this torch, as .pt"
        if records is not None:
            reason = "was saved from the device meta and has no numbers: save one that has"
        raise ProblemError(f"{name}: {label} {reason}")
    tensor_in_file = _torch_tensor(name, path, key, label, found, begin, stamp)
    _check_storage(name, tensor_in_file, begin, found.untyped_storage().nbytes(), records.get(begin, 0))
    return tensor_in_file


def _records(name: str, path: Path, file: IO[bytes]) -> dict[int, int] | None:
    """Where each record of an archive begins, and its bytes; None for a file of another format, of which torch says what.

    Raises ProblemError where stored elements are compressed or swapped (torch hides the one, and crashes on the other), or
    the archive is cut short.
    """
    found: dict[int, int] = {}
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if file.read(4) == b"PK\3\4":
            raise ProblemError(f"{name}: {path} is not a whole file of torch.save: it was cut short; copy it again")
        file.seek(0)
        return None
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ProblemError(f"{name}: {path} is compressed: load it, and save it again with torch.save")
            if entry.filename.rpartition("/")[2] == "byteorder" and archive.open(entry).read(16) != b"little":
                raise ProblemError(
                    f"{name}: {path} has numbers of another byte order than little-endian: save it again on this machine"
                )
            if entry.filename.rpartition("/")[2] == "data.pkl" and _lies_backwards(archive.open(entry)):
                raise ProblemError(f"{name}: {path} has a tensor with a negative stride: it is damaged; save it again")
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER)
            lengths = struct.unpack_from("<HH", header, 26) if len(header) == _LOCAL_HEADER else (0, 0)
            found[entry.header_offset + _LOCAL_HEADER + sum(lengths)] = entry.file_size
    file.seek(0)
    return found


class _Inert(dict[Any, Any]):
    """What stands for an object of any class in a file. What it would be made of is kept in `made`."""

    made: ClassVar[list[tuple[object, ...]]]

    def __new__(cls, *arguments: object) -> _Inert:
        cls.made.append(arguments)
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        super().__init__()


class _Reader(pickle.Unpickler):
    """Reads what a file says of its tensors; of what it names nothing is imported or called."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.made: list[tuple[object, ...]] = []

    def find_class(self, module: str, name: str) -> Any:
        """A class of inert objects, in the place of any other."""
        return type("_Inert", (_Inert,), {"made": self.made})

    def persistent_load(self, pid: Any) -> Any:
        """Nothing: storages are not read."""
        return None


def _lies_backwards(file: IO[bytes]) -> bool:
    """Whether a tensor has a negative stride: torch.load refuses it, but to "meta" makes a tensor without gaps of it."""
    reader = _Reader(file)
    with suppress(Exception):  # torch says what it does not understand
        reader.load()
        return any(
            extent > 1 and stride < 0
            for arguments in reader.made
            for extents, strides in _shapes_with_strides(arguments)
            for extent, stride in zip(extents, strides, strict=True)
        )
    return False


def _shapes_with_strides(arguments: tuple[object, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Neighbouring tuples of as many integers, also in tuples among the arguments, as of subclasses of tensors."""
    tuples = [each if isinstance(each, tuple) else () for each in arguments]
    for each in tuples:
        yield from _shapes_with_strides(each)
    for extents, strides in pairwise(tuples):
        if len(extents) == len(strides) and all(type(number) is int for number in extents + strides):
            yield extents, strides


def _without_data() -> AbstractContextManager[object]:
    """A context in which torch.load to "meta" reads no elements. Older versions need fake tensors for that."""
    import torch

    if hasattr(torch.serialization, "_is_meta_location"):
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _torch_tensor(
    name: str, path: Path, key: str, label: str, found: torch.Tensor, begin: int, stamp: tuple[int, int]
) -> FileTensor:
    """Where a tensor of torch's lies in its file, its storage from byte `begin` on."""
    dtype = str(found.dtype).removeprefix("torch.")
    if dtype not in FILE_DTYPES.values():
        raise unsupported(name, label, dtype)
    numbers = numpy_dtype(dtype).newbyteorder("<")
    strides = tuple(stride * numbers.itemsize for stride in found.stride())
    offset = begin + int(found.storage_offset()) * numbers.itemsize
    return FileTensor(path, key, tuple(found.shape), numbers, offset, strides, stamp)


def _check_storage(name: str, tensor: FileTensor, begin: int, nbytes: int, recorded: int) -> None:
    """Raise ProblemError where a storage of `nbytes`, or what it has of a tensor, is more than is `recorded`.

    torch makes a storage without data as large as its tensors need.
    """
    last = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    end = tensor.offset - begin + sum(last) + tensor.dtype.itemsize if 0 not in tensor.shape else 0
    if recorded < max(nbytes, end):
        raise ProblemError(
            f"{name}: {tensor.label} has {recorded:,} bytes of numbers in the file, expected {max(nbytes, end):,}: it is "
            "damaged; copy the file again, or save it again"
        )
