"""Products of matrices, cut so small that a BLAS computes each in the thread that asks.

Its own threads wait for each other, and for those of other callers: on busy cores a product takes fifty times as long.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array64 = npt.NDArray[np.float64]

ROWS = 64  # of one product, at most
TERMS = 1 << 18  # of its sums, at most: of more, OpenBLAS begins threads
TOGETHER = 16  # parts of a sum that are held at a time


def multiply(rows: Array64, others: Array64, out: Array64) -> None:
    """The products of rows [m, D] and others [n, D], each with each, into `out` [m, n]."""
    for first in range(0, len(rows), ROWS):
        some, into = rows[first : first + ROWS], out[first : first + ROWS]
        part = _part(some.size)
        whole = len(others) - len(others) % part
        parts = others[:whole].reshape(-1, part, others.shape[1])
        np.matmul(some, parts.swapaxes(1, 2), out=into[:, :whole].reshape(len(some), -1, part).swapaxes(0, 1))
        np.matmul(some, others[whole:].T, out=into[:, whole:])


def weigh(weights: Array64, values: Array64) -> Array64:
    """The sums of `values` [n, Dv] with these `weights` [m, n]: [m, Dv]."""
    found = np.empty((len(weights), values.shape[1]))
    for first in range(0, len(weights), ROWS):
        some, sums = weights[first : first + ROWS], found[first : first + ROWS]
        part = _part(sums.size)
        whole = len(values) - len(values) % part
        np.matmul(some[:, whole:], values[whole:], out=sums)
        for start in range(0, whole, TOGETHER * part):
            keys = slice(start, min(start + TOGETHER * part, whole))
            parts = some[:, keys].reshape(len(some), -1, part).swapaxes(0, 1)
            sums += np.matmul(parts, values[keys].reshape(-1, part, values.shape[1])).sum(axis=0)
    return found


def dot(rows: Array64, other: Array64) -> Array64:
    """The dot products of rows [m, n] and another row [n]: [m]. Python's lock is free meanwhile; `np.vecdot` holds it."""
    found: Array64 = np.einsum("mn,n->m", rows, other)
    return found


def _part(terms: int) -> int:
    """Keys of one product, which have so many terms each: a power of two."""
    return 1 << (max(1, TERMS // max(1, terms)).bit_length() - 1)
