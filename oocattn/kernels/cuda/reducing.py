"""What survey.cu is compiled for and what it is given besides a call: where sums of weights, and the largest, are kept."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from oocattn.kernels.reductions.base import Reducing
from oocattn.kernels.state import AttentionState
from oocattn.units import round_up

_PLACES, _SPARE = 32, 24  # places of a row's list are a multiple; those besides the weights that are kept, at least
_SLOTS = 2  # steps whose sums over rows are on their way (totals.cuh)
_WARPS = 4  # of a consumer, which have sums of their own
_ROWS, _PADDING = 8, 8  # of what a warp adds up over its rows


class Reductions(NamedTuple):
    """What is made of the weights: sums with their logarithms, of each key, of pools; and how many of a row are kept."""

    logarithms: bool = False
    received: bool = False
    pooled: bool = False
    top: int = 0

    @classmethod
    def of(cls, reducing: Reducing) -> Reductions:
        """What a call asks for. Raises ValueError for one whose sums do not lie on a GPU."""
        totals = reducing.totals
        if totals is None:
            raise ValueError("the sums over rows of a call on a GPU must lie there")
        top = max((each.top for each, _ in reducing.rows), default=0)
        return cls(reducing.needs_exponents, totals.received is not None, totals.pools is not None, top)

    @property
    def places(self) -> int:
        """Places of a row's list."""
        return round_up(self.top + _SPARE, _PLACES)

    @property
    def macros(self) -> Mapping[str, int]:
        """What survey.cu is compiled with."""
        return {**{name.upper(): int(value) for name, value in self._asdict().items()}, "PLACES": self.places}

    def shared_bytes(self, consumers: int, rows: int, keys: int) -> int:
        """Bytes of shared memory, for so many rows of a tile and keys of a step."""
        lists = rows * (8 * self.places + 4) if self.top else 0
        of_keys = 4 * _WARPS * consumers * (_SLOTS * keys + _ROWS * (keys + _PADDING))
        return lists + (of_keys if self.received else 0)


class _Totals(ctypes.Structure):
    """`Totals` of totals.cuh."""

    _fields_ = (
        ("received", ctypes.c_void_p),
        *[(name, ctypes.c_longlong) for name in ("received_head", "received_low")],
        ("pooled", ctypes.c_void_p),
        *[(name, ctypes.c_longlong) for name in ("pooled_head", "pooled_low")],
        ("pools", ctypes.c_void_p),
        *[(name, ctypes.c_int) for name in ("pools_of_keys", "rows_of_pool", "before")],
    )


class _Reduced(ctypes.Structure):
    """`Reduced` of survey.cu."""

    _fields_ = (
        ("logarithms", ctypes.c_void_p),
        ("logarithms_head", ctypes.c_longlong),
        ("top", ctypes.c_void_p),
        *[(name, ctypes.c_longlong) for name in ("top_head", "top_row")],
        ("key_numbers", ctypes.c_void_p),
        ("totals", _Totals),
    )


@dataclass(frozen=True)
class Reduced:
    """What becomes of the weights of a call, or of a part of it from a head, a row and a key on."""

    reducing: Reducing
    logarithms: torch.Tensor | None
    head: int = 0
    row: int = 0
    key: int = 0

    @classmethod
    def begin(cls, reducing: Reducing, state: AttentionState) -> Reduced:
        """Begin with a call; sums of its rows by themselves begin at 0."""
        return cls(reducing, torch.zeros_like(state.den) if reducing.needs_exponents else None)

    def part(self, head: int, row: int, key: int) -> Reduced:
        """Of a part of the call."""
        return replace(self, head=head, row=row, key=key)

    def argument(self, state: AttentionState) -> ctypes.Structure:
        """The argument `Reduced`; `state` is of the part."""
        argument, totals, places = _Reduced(), self.reducing.totals, self.reducing.places
        assert totals is not None
        first_key = places.keys.start + self.key
        if self.logarithms is not None:
            argument.logarithms = self.logarithms[self.head, self.row :].data_ptr()
            argument.logarithms_head = self.logarithms.stride(0)
        for (first, _), (reduction, _) in zip(self._columns(), self.reducing.rows, strict=True):
            if reduction.top:
                assert totals.key_numbers is not None
                argument.top = state.num[:, :, first:].data_ptr()
                argument.top_head, argument.top_row, _ = state.num.stride()
                argument.key_numbers = totals.key_numbers[first_key:].data_ptr()
        sums = argument.totals
        if totals.received is not None:
            sums.received = totals.received[0, self.head, first_key:].data_ptr()
            sums.received_low, sums.received_head, _ = totals.received.stride()
        if (pools := totals.pools) is not None:
            sums.pooled = pools.sums[0, self.head].data_ptr()
            sums.pooled_low, sums.pooled_head, sums.pools_of_keys, _ = pools.sums.stride()
            sums.pools, sums.rows_of_pool = pools.of_keys[first_key:].data_ptr(), pools.rows
            sums.before = pools.before + places.rows.start - totals.tokens.start + self.row
        return argument

    def finish(self, state: AttentionState) -> None:
        """Add the sums of the call's rows to the columns of the reductions that need them."""
        for (first, stop), (reduction, _) in zip(self._columns(), self.reducing.rows, strict=True):
            reduction.add_row_sums(state.num[..., first:stop], self.logarithms)

    def _columns(self) -> list[tuple[int, int]]:
        """The first and last columns of each reduction."""
        return list(pairwise(accumulate((columns for _, columns in self.reducing.rows), initial=0)))
