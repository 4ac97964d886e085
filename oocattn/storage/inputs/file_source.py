"""Tensors in .npy, .safetensors and .pt files as sources of a run, read where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import open_regular, read_exactly
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.direct import MOST_THREADS, SCRATCH_BYTES, DirectReader
from oocattn.storage.inputs.file_tensor import FileTensor
from oocattn.storage.inputs.fingerprints import unusual
from oocattn.storage.inputs.origin import Origin
from oocattn.storage.inputs.parts import Part
from oocattn.storage.inputs.source import Opened, TensorSource, heads_between
from oocattn.storage.inputs.tensor_files import named_file, open_tensor_file, open_tensor_in
from oocattn.storage.locations import parse_location
from oocattn.storage.remote.options import StorageOptions

SAMPLES, SAMPLED_BYTES = 10, 1 << 16
"""Places of a file whose content is part of its fingerprint, and how much there."""


class FileSource(TensorSource):
    """A tensor in a file, read in place."""

    def __init__(self, name: str, tensor: FileTensor, axes: Axes) -> None:
        origin = Origin(tensor.path.suffix.lstrip("."), str(tensor.path), tensor.key, axes)
        super().__init__(name, origin, tensor.shape, tensor.dtype.name)
        self._tensor = tensor
        self._file = tensor.file(f"{name} ({tensor.label})")
        self._reading = DirectReader()

    def __reduce__(self) -> tuple[Any, ...]:
        return FileSource, (self.name, self._tensor, self.axes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `TensorSource.dtype`."""
        return self._tensor.dtype.newbyteorder("=")

    @property
    def path(self) -> Path:
        """See `TensorSource.path`."""
        return self._tensor.path

    @property
    def reader(self) -> str:
        """How rows are read: "preadv" or "map", as was measured."""
        return self._reading.name(self.shared_heads)

    @cached_property
    def shared_heads(self) -> int:
        """See `TensorSource.shared_heads`."""
        return heads_between(self, self.extents[2])

    @cached_property
    def _scattered(self) -> bool:
        """Whether other bytes lie between the rows of a head."""
        return any(part.scattered for part in self.parts(0, 0, 0, self.extents[2]))

    @property
    def decode_bytes(self) -> int:
        """See `TensorSource.decode_bytes`."""
        return MOST_THREADS * SCRATCH_BYTES if self._scattered else 0

    def describe(self) -> str:
        """See `TensorSource.describe`."""
        return f"in {self._tensor.label}, read in place"

    def check_complete(self) -> None:
        """See `TensorSource.check_complete`; that the file is whole was checked as it was opened."""
        self.reopen()

    def fingerprints(self) -> tuple[str, str, str]:
        """See `TensorSource.fingerprints`."""
        tensor = self._tensor
        text = f"{self.name} {tensor.shape} {tensor.dtype.str} {tensor.offset} {tensor.strides}"
        beginning = "".join([text, *unusual(self.axes, len(tensor.shape))]).encode()
        recorded, within_run, untimed = digests = tuple(hashlib.sha256(beginning) for _ in range(3))
        with open_regular(tensor.path) as descriptor:
            status = os.fstat(descriptor)
            recorded.update(f"\n{(status.st_size, status.st_mtime_ns)}".encode())
            within_run.update(f"\n{(status.st_size, status.st_mtime_ns, status.st_ctime_ns)}".encode())
            untimed.update(f"\n{status.st_size}".encode())
            last = max(0, status.st_size - SAMPLED_BYTES)
            for place in range(SAMPLES):
                content = read_exactly(descriptor, SAMPLED_BYTES, place * last // (SAMPLES - 1), tensor.path)
                for digest in digests:
                    digest.update(content)
        return recorded.hexdigest()[:32], within_run.hexdigest()[:32], untimed.hexdigest()[:32]

    def reopen(self) -> TensorSource:
        """See `TensorSource.reopen`."""
        return FileSource(self.name, open_tensor_in(self.name, self._tensor.path, self._tensor.key or None), self.axes)

    def parts(self, batch: int, head: int, start: int, stop: int) -> Sequence[Part]:
        """See `TensorSource.parts`."""
        return [self._tensor.part(self.axes.select(batch, head, slice(start, stop)), self._file)]

    def _read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        self._reading.read([(self.parts(batch, head, start, stop), out)])

    def _read_heads(self, batch: int, heads: Sequence[int], start: int, stop: int, outs: Sequence[NDArray[Any]]) -> None:
        self._reading.read([(self.parts(batch, head, start, stop), out) for head, out in zip(heads, outs, strict=True)])


def open_file(name: str, typed: object, _: StorageOptions | None = None) -> Opened | None:
    """The tensor in a file; None for what names none, or a folder: an array of Zarr may be called like a file."""
    found = named_file(os.fsdecode(typed)) if isinstance(typed, str | os.PathLike) else None
    if found is None:
        return None
    path = parse_location(found[0], name).path
    if found[1] is None and path is not None:
        with name_failure("look at", path):
            if path.is_dir():
                return None
    tensor = open_tensor_file(name, typed)
    return Opened(tensor.label, tensor.shape, lambda own, axes: FileSource(own, tensor, axes))
