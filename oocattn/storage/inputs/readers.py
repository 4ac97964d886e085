"""Input arrays as a run sees them: read by rows of one head. Plain files are read by direct.py, others by codecs.py."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.problem.arrays import KEY_BIAS, ArraySpec
from oocattn.storage.inputs.codecs import CodecReader
from oocattn.storage.inputs.direct import FastestReader, read_mapped
from oocattn.storage.layout import ChunkFiles, obstacles, token_axis
from oocattn.storage.mapped_store import MappedStore


class InputArray:
    """An array of a dataset, read by rows of one head: [B, H, N, D], or key_bias [B, H, N]. B may be left out.

    Reads may run in several threads at once. Messages call the dataset `location`; its arrays share one `fastest`.
    """

    def __init__(self, name: str, array: zarr.Array[Any], location: str, fastest: FastestReader | None = None) -> None:
        self.name = name
        self.array = array
        self._location = location
        self._root = array.store.root if isinstance(array.store, MappedStore) else None
        self._fastest = fastest or FastestReader()
        self._row_rank = 0 if name == KEY_BIAS else 1
        self._axis = token_axis(array, self._row_rank)

    @cached_property
    def spec(self) -> ArraySpec:
        """Name, shape and dtype; a dtype that is not ours keeps Zarr's name for it."""
        return ArraySpec(self.name, self.array.shape, self.array.dtype.name)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `read_rows`' buffers: the array's, in native byte order."""
        return self.array.dtype.newbyteorder("=")

    @property
    def extents(self) -> tuple[int, int, int]:
        """Batches, heads and tokens."""
        batch, heads, tokens = (1, *self.array.shape[: self._axis + 1])[-3:]
        return batch, heads, tokens

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of what one token has: (D,), or () in key_bias."""
        return self.array.shape[self._axis + 1 :]

    @property
    def row_bytes(self) -> int:
        """Bytes of what one token has."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def direct(self) -> bool:
        """Whether the chunk files are read directly, not through Zarr."""
        return self._files is not None

    @property
    def chunk_rows(self) -> int:
        """Tokens of a chunk; reads that start and stop there touch only whole ones."""
        return self.array.chunks[self._axis]

    @property
    def decode_bytes(self) -> int:
        """Bound on host memory, in bytes, of one read besides the caller's buffer."""
        return 0 if self.direct else self._codec_reader.decode_bytes

    @property
    def reader(self) -> str:
        """How rows are read: "preadv" or "map", as was measured, or "zarr"."""
        if not self.direct:
            return "zarr"
        return "map" if self._fastest.learned is read_mapped else "preadv"

    def describe(self) -> str:
        """How the array is stored and therefore read, for the plan to print."""
        if self.direct:
            return "uncompressed, read directly"
        found = obstacles(self.array, self._row_rank)
        if (heads := math.prod(self.array.chunks[: self._axis])) > 1:
            found.append(f"{heads} heads to a chunk")
        if self._root is None:
            found.append("not in a local folder")
        return f"{', '.join(found)}: read through Zarr's codecs"

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Read tokens [start, stop) of one head into `out` [stop - start, D], or [stop - start] for key_bias.

        `out` is C-contiguous, of dtype `dtype`. Raises ValueError for rows that the array has not or a buffer that does not
        fit, and IntegrityError for a chunk that is missing, of the wrong size or undecodable; `out` is then undefined.
        """
        batches, heads, tokens = self.extents
        if not (0 <= batch < batches and 0 <= head < heads and 0 <= start < stop <= tokens):
            raise ValueError(
                f"tokens [{start}, {stop}) of batch {batch}, head {head} of {self.name!r}: "
                f"the array has {batches} batches, {heads} heads and {tokens} tokens"
            )
        expected = (stop - start, *self.row_shape)
        if out.shape != expected or out.dtype != self.dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"buffer of {out.dtype} {list(out.shape)} for rows of {self.name!r}: expected {self.dtype} "
                f"{list(expected)}, C-contiguous and writeable"
            )
        if self._files is not None:
            self._fastest.read(self._files, batch, head, start, stop, out)
        else:
            self._codec_reader.read(batch, head, start, stop, out)

    @cached_property
    def _files(self) -> ChunkFiles | None:
        if self._root is None or obstacles(self.array, self._row_rank):
            return None
        return ChunkFiles(self.array, self._root, self._location, self._row_rank)

    @cached_property
    def _codec_reader(self) -> CodecReader:
        return CodecReader(self.array, self._location, self._row_rank)
