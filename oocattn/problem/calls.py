"""The size of a kernel's call, from which the memory that it takes follows; no torch, for plans are read without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oocattn.problem.second_pass import Reduced


@dataclass(frozen=True)
class CallSize:
    """Rows of g heads against keys, at most: q [g, rows, head_dim], k [keys, head_dim], v [keys, value_dim].

    `plain` says that scores have no term but the scale, `masked` that rows may attend different keys other than up to a
    diagonal, `threads` is the number that compute on a CPU, and `reduced` is what a second pass makes of the weights.
    """

    group_size: int
    rows: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str
    threads: int = 1
    plain: bool = True
    masked: bool = False
    reduced: tuple[Reduced, ...] = ()


ScratchBytes = Callable[[CallSize], int]
"""Bytes that a kernel's call allocates at most."""
