"""A band of keys at any offset between queries and keys, as the arguments of a problem, where both end together.

Row i of Nq attends key j of Nk where i + offset - left <= j <= i + offset + right. In a problem the last row is at the last
key: p(i) = i + Nk - Nq. So keys beyond the last row's are left out, and the bounds of the window are moved by as many keys
as the last row is beyond the last key. Torch's `is_causal` (top-left) has offset 0 and right 0. Pure integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from oocattn.problem.options import Window


@dataclass(frozen=True)
class Aligned:
    """The rows and keys that take part, the first so many of each, and the mask between them."""

    rows: int
    keys: int
    causal: bool
    window_size: Window


def align(queries: int, keys: int, offset: int = 0, left: int | None = None, right: int = 0) -> Aligned:
    """The problem in which row i attends the keys from `left` (None: all) before i + `offset` to `right` after it.

    Rows that are left out attend no key; all are where none does.
    """
    kept = max(0, min(keys, queries + offset + right))
    rows = queries if left is None else max(0, min(queries, kept - offset + left))
    if not (rows and kept):
        return Aligned(0, 0, True, (None, None))
    beyond = rows + offset - kept
    window = (None if left is None else left - beyond, right + beyond)
    return Aligned(rows, kept, window[1] == 0, window)
