"""The items of calls whose rows have bounds of their own, listed on the GPU (bounds.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch

from oocattn.kernels.cuda.items import COUNTERS, FEWEST_STEPS, PROCESSORS, most_listed, most_steps
from oocattn.kernels.cuda.pieces import cut, most_pieces
from oocattn.kernels.cuda.program import Program
from oocattn.kernels.cuda.tuning import Tuning
from oocattn.kernels.intervals import Intervals
from oocattn.units import ceil_div

MOST_PIECES = most_pieces(np.int32)


class _Listing(ctypes.Structure):
    """`Listing` of bounds.cu."""

    _fields_ = (
        *[(name, ctypes.c_int) for name in ("rows", "tiles", "heads")],
        *[(name, ctypes.c_void_p) for name in ("ended", "listed", "items", "walks", "wholes", "bounds", "positions")],
    )


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a listed call lie, in int32 from the start of one buffer."""

    heads: int
    rows: int
    keys: int
    tuning: Tuning
    positions: bool

    @cached_property
    def tiles(self) -> int:
        """Tiles of a head."""
        return ceil_div(self.rows, self.tuning.rows)

    @cached_property
    def most_items(self) -> int:
        """The most items of a head."""
        return most_listed(self.heads, self.rows, self.keys, self.tuning)

    @property
    def counters(self) -> int:
        """Numbers that are 0 at first."""
        return COUNTERS + self.heads * self.tiles * self.tuning.consumers

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of the items, walks, wholes, bounds and positions."""
        rows = self.tiles * self.tuning.rows
        return 4 * self.most_items, 4 * self.tiles, 4 * self.tiles, 4 * rows, rows if self.positions else 0

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The places, in bytes, at which they begin."""
        return tuple(accumulate((4 * size for size in self.sizes[:-1]), initial=0))


layout_of = lru_cache(1024)(Layout)


@dataclass(frozen=True)
class Listed:
    """What bounds.cu leaves in device memory: the addresses that a `Call` of items.cuh has."""

    layout: Layout
    counters: torch.Tensor
    numbers: torch.Tensor

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Next item, turns, number of items, items, walks, wholes, bounds, positions."""
        counters, numbers = self.counters.data_ptr(), self.numbers.data_ptr()
        found = [numbers + start for start in self.layout.starts]
        return counters, counters + 4 * COUNTERS, counters + 8, *found[:4], found[4] if self.layout.positions else 0

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The items, walks, wholes, bounds and positions, for tests; the items up to their number."""
        *fours, positions = self.numbers.split(self.layout.sizes)
        items, *others = (part.view(-1, 4) for part in fours)
        return items[: int(self.counters[2])], *others, positions


def list_items(heads: int, intervals: Intervals, tuning: Tuning, device: torch.device, *, positions: bool) -> Listed:
    """List the items of a call of `intervals`, of MOST_PIECES pieces at most, in one launch."""
    layout = layout_of(heads, intervals.rows, intervals.keys, tuning, positions)
    counters = torch.zeros(layout.counters, dtype=torch.int32, device=device)
    listed = Listed(layout, counters, torch.empty(sum(layout.sizes), dtype=torch.int32, device=device))
    start, _, *others = listed.addresses
    listing = _Listing(layout.rows, layout.tiles, heads, start + 4, *others)
    ((_, pieces),) = cut(intervals.table, np.int32)
    _program(tuning).launch("list", device, layout.tiles, tuning.rows, (pieces, listing))
    return listed


@cache
def _program(tuning: Tuning) -> Program:
    sizes = {"MOST_PIECES": MOST_PIECES, "PROCESSORS": PROCESSORS, "FEWEST_STEPS": FEWEST_STEPS}
    steps = {"CONSUMERS": tuning.consumers, "KEYS": tuning.keys, "MOST_STEPS": most_steps(tuning)}
    return Program("bounds.cu", {**sizes, **steps, "LISTED": 1, "SPLIT": 0, "MOST_SLOPES": 1, "ITEMS": 1})
