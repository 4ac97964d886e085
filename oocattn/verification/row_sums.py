"""Sums over the elements of rows, many rows at a time, in float32 where that is exact enough.

A row of 16 bits was rounded by some 2^-12 of its norm, and one summed in float32 errs by 2^-22 of it. Rows of float32 are
projected in float64. A row whose sums may leave the range of float32 is summed in float64: one of tiny or huge numbers, of
NaN or Inf, or of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn.units import ceil_div
from oocattn.verification.noise import MANTISSA, Array64, rounding_variance
from oocattn.verification.rounding import SMALLEST

TILE = 1 << 20
"""Elements that are summed at a time: few enough for the processor's caches, many enough for several threads.

Between two steps of a sum a thread holds Python's lock for some microseconds.
"""

TILE_ROWS = 1 << 15  # rows that are, at most: of few columns
PRODUCT = 1 << 15  # elements of the rows of one product: so few that a BLAS begins no threads of its own for it

LEAST, MOST = np.float32(2.0**-80), np.float32(2.0**100)
"""Between these, a sum of squares in float32 is as exact as its terms."""

_EXPONENT = np.int32(0xFF << 23)  # of float32

Array32 = npt.NDArray[np.float32]
Rows = npt.NDArray[Any]  # of float16, bfloat16 or float32


class RowSums:
    """Sums over the elements of rows of a dtype, in memory that is used again: for one thread.

    Rows have `columns` elements at most. It is given no more than `most_rows` at a time.
    """

    def __init__(self, dtype: str, columns: int, most_rows: int) -> None:
        self._tile_rows, self._part_rows = _tile_and_part(columns, most_rows)
        self._half = "" if dtype == "float32" else dtype
        self._wide = np.empty(self._tile_rows * columns if self._half else 0, np.float32)

    def squares(self, rows: Rows) -> Array64:
        """The sum of the squares of each row: [n]."""
        found = np.empty(len(rows))
        for first in range(0, len(rows), self._tile_rows):
            tile = rows[first : first + self._tile_rows]
            wide = self._widen(tile) if self._half else tile
            found[first : first + len(tile)] = sums = np.vecdot(wide, wide)
            for odd in self._parts(~_in_range(sums)):
                found[first + odd] = _squares(tile[odd].astype(np.float64))
        return found

    def _parts(self, chosen: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.int64]]:
        """The places of rows that are chosen, a part at a time."""
        places = np.flatnonzero(chosen)
        for first in range(0, len(places), self._part_rows):
            yield places[first : first + self._part_rows]

    def _widen(self, rows: Rows) -> Array32:
        """Rows in float32, in memory that is used again."""
        wide = self._wide[: rows.size].reshape(rows.shape)
        if self._half:
            import torch  # ten times as fast; sampled rows need neither

            torch.from_numpy(wide).copy_(torch.from_numpy(rows.view(np.int16)).view(getattr(torch, self._half)))
        else:
            np.copyto(wide, rows)
        return wide


class OutSums(RowSums):
    """The same for rows of `out`, which are projected on the vectors `signs` [Dv, W]."""

    def __init__(self, dtype: str, signs: Array64, most_rows: int) -> None:
        super().__init__(dtype, len(signs), most_rows)
        self._signs = signs
        self._turned: npt.NDArray[Any] = np.ascontiguousarray(signs.T, np.float32 if self._half else np.float64)
        self._wide = np.empty(self._tile_rows * len(signs), np.float32)
        self._operand: npt.NDArray[Any] = self._wide if self._half else np.empty(self._wide.size)
        self._products = np.empty((signs.shape[1], self._tile_rows), self._turned.dtype)
        spacing = 2.0 ** -MANTISSA[dtype]  # of 1
        self._variance = np.float64(spacing**2 / 12)
        self._least_power = np.float32(SMALLEST[dtype] / spacing).view(np.int32)

    def compare(self, out: Rows, passed: Array32) -> Array64:
        """Rows of `out` beside their projections `passed` [n, W]: [4, n].

        Of each row: the largest difference from a projection, the square of its norm as `out` has it and as `passed` has it,
        and the variance of the errors by which its elements were rounded.
        """
        found = np.empty((4, len(out)))
        for first in range(0, len(out), self._tile_rows):
            rows, expected = out[first : first + self._tile_rows], passed[first : first + self._tile_rows]
            differences, squares, of_passed, variances = found[:, first : first + len(rows)]
            wide = self._widen(rows)
            products = self._project(wide)
            products -= expected.T
            np.abs(products, out=products)
            differences[...] = np.maximum.reduce(products, axis=0)
            sums, others = np.vecdot(wide, wide), np.vecdot(expected, expected)
            squares[...] = sums
            np.divide(others, expected.shape[1], out=of_passed)
            variances[...] = self._rounding_variance(wide)
            for odd in self._parts(~(_in_range(sums) & (others < MOST))):
                found[:, first + odd] = self._compare_exactly(rows[odd], expected[odd])
        return found

    def _compare_exactly(self, out: Rows, passed: Array32) -> tuple[Array64, Array64, Array64, Array64]:
        """As `compare`, in float64."""
        exact, expected = out.astype(np.float64), passed.astype(np.float64)
        differences = np.abs(np.einsum("nd,dk->nk", exact, self._signs) - expected).max(axis=1)
        return differences, _squares(exact), _squares(expected) / expected.shape[1], rounding_variance(out)

    def _project(self, wide: Array32) -> npt.NDArray[Any]:
        """The projections of rows that `_widen` gave: [W, n]."""
        rows, columns = wide.shape
        if not self._half:
            np.copyto(self._operand[: wide.size].reshape(wide.shape), wide)
        parts = ceil_div(rows, self._part_rows)  # the last one may end in what an earlier tile has left
        within = parts * self._part_rows
        operand = self._operand[: within * columns].reshape(parts, self._part_rows, columns)
        products = self._products[:, :within].reshape(-1, parts, self._part_rows)
        np.matmul(self._turned, operand.swapaxes(1, 2), out=products.swapaxes(0, 1))
        return self._products[:, :rows]

    def _rounding_variance(self, wide: Array32) -> Array64:
        """As `rounding_variance`, of rows that `_widen` gave, which become the powers of two below them."""
        bits = wide.view(np.int32)
        np.bitwise_and(bits, _EXPONENT, out=bits)
        bits.clip(self._least_power, _EXPONENT, out=bits)
        found: Array64 = np.vecdot(wide, wide) * self._variance
        return found


def sums_bytes(dtype: str, columns: int, vectors: int, most_rows: int) -> int:
    """Host memory, in bytes, of a `RowSums` and an `OutSums` of a dtype, and of what they make, at most."""
    tile, part = _tile_and_part(columns, most_rows)
    exactly = part * columns * (2 * 4 + 2 * 8)  # as stored, in float64, exponents, their variances
    wide = 2 * 4 + (8 if dtype == "float32" else 0)
    return tile * (columns * wide + vectors * 8 + 8 * 8) + exactly


def _tile_and_part(columns: int, most_rows: int) -> tuple[int, int]:
    """Rows that are summed at a time, and rows of one product: powers of two."""
    padded, enough = (columns - 1).bit_length(), 1 << (most_rows - 1).bit_length()
    tile = max(1, min(TILE_ROWS, TILE >> padded, enough))
    return tile, max(1, min(tile, PRODUCT >> padded))


def _in_range(squares: Array32) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (squares > LEAST) & (squares < MOST)
    return found


def _squares(rows: Array64) -> Array64:
    found: Array64 = np.vecdot(rows, rows)
    return found
