"""The bounds of rows as arguments of a launch (pieces.cuh): nothing is allocated for them, nor copied by itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

COLUMNS = 10  # numbers of a `Piece` of pieces.cuh
MOST_BYTES = 16_384  # of a launch's pieces; its arguments may have twice as many
_TYPES: dict[Any, Any] = {np.int32: ctypes.c_int, np.int64: ctypes.c_longlong}

Integer = type[np.int32] | type[np.int64]


def most_pieces(integer: Integer) -> int:
    """The most pieces of one launch."""
    return MOST_BYTES // np.dtype(integer).itemsize // COLUMNS


def cut(table: npt.NDArray[np.int64], integer: Integer, first_row: int = 0) -> Iterator[tuple[range, ctypes.Array[Any]]]:
    """The rows of each launch, and its argument `Pieces`, of `Bounds.table`, whose columns are those of pieces.cuh."""
    most = most_pieces(integer)
    for first in range(0, len(table), most):
        part = table[first : first + most]
        content = np.zeros(2 + COLUMNS * most, integer)
        content[:2] = first_row, len(part)
        content[2 : 2 + part.size] = part.ravel()
        stop_row = int(part[-1, 0])
        yield range(first_row, stop_row), (_TYPES[integer] * len(content)).from_buffer(content)
        first_row = stop_row


@cache
def no_pieces(integer: Integer) -> ctypes.Array[Any]:
    """The argument `Pieces` where there are none."""
    return next(cut(np.zeros((1, COLUMNS), np.int64), integer))[1]
