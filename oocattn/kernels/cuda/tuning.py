"""How programs of hopper.cu are cut, by shared memory and registers: rows of a tile, keys of a step, stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

from oocattn.kernels.cuda.reducing import Reductions
from oocattn.units import round_up

PANEL = 64  # columns that are loaded at a time
ROWS_OF_CONSUMER = 64  # of a tile, for each group of warps that multiplies
MOST_COLUMNS = {1: 256, 2: 128}  # D and Dv, by the parts of a number or of a weight
FOLDED_KEYS = 16_384  # in the sums of the matrix units: their error is a third of the weights' (NOTES.md)
_LONG_SPAN = 65_536  # keys of an item where sums are folded, or nothing is multiplied with values
RESTARTED_KEYS = 256  # after which the sums of weights in two parts are added up in float32
_STEPS = (128, 80, 64)  # keys of a step
_REDUCED_CUTS = ((3, 128), (2, 128), (2, 64), (1, 128), (1, 64))  # consumers, and keys of a step, where weights are reduced
_STAGES = (3, 2)  # steps whose keys and values are held
_SHARED_BYTES = 232_448  # of a multiprocessor
_OTHER_BYTES = 3072  # of it: barriers, items, and up to 1,024 that align the rest
_REGISTERS = 192  # of the 232 of a thread, for scores, weights and sums; the others are for addresses and the softmax


class Numbers(NamedTuple):
    """The 16-bit parts of a number of the rows and of a weight, 1 or 2, and what split.cu makes of the operands."""

    parts: int
    weight_parts: int
    split: Literal["nothing", "values", "all"]


def numbers_for(dtype: str, *, precise: bool = False, shifted: bool = False, reduced: bool = False) -> Numbers:
    """How rows of a dtype are multiplied.

    `precise` keeps two parts of a weight also where one would have their bits. Weights of `shifted` calls are of float16,
    and so are values, which are projected; those that are `reduced` are multiplied with nothing.
    """
    if reduced:
        return Numbers(2, 1, "all") if dtype == "float32" else Numbers(1, 1, "nothing")
    if dtype == "float32":
        return Numbers(2, 2, "all")
    if shifted:
        return Numbers(1, 1, "values")
    # Two bfloat16 parts of a weight have 16 bits, two of float16 22: and float16 holds all bfloat16 values, scaled.
    return Numbers(1, 1 + precise, "values" if precise and dtype == "bfloat16" else "nothing")


@dataclass(frozen=True)
class Tuning:
    """The cut of one program; an item has `span` keys at most."""

    consumers: int
    keys: int
    stages: int
    numbers: Numbers
    folds: bool
    span: int
    shared_bytes: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return ROWS_OF_CONSUMER * self.consumers

    @property
    def restart(self) -> int:
        """Steps after which sums are added up in registers; 0: never."""
        return RESTARTED_KEYS // self.keys if self.numbers.weight_parts == 2 else 0

    @property
    def fold(self) -> int:
        """Steps after which they are added up in shared memory; 0: where there is no room."""
        return FOLDED_KEYS // self.keys if self.folds else 0


@cache
def tuning_for(head_dim: int, value_dim: int, numbers: Numbers, *, long: bool, plain: bool) -> Tuning:
    """The tuning for D = head_dim and Dv = value_dim, up to MOST_COLUMNS.

    `long` says that calls may have more than FOLDED_KEYS keys: shorter ones have room for another stage instead. `plain`
    says that scores have no term but the scale: terms need the registers of a third consumer.
    """
    parts, weight_parts, _ = numbers
    widths = round_up(head_dim, PANEL), round_up(value_dim, PANEL)
    cuts = [(2, keys) for keys in _STEPS]
    if plain and widths[1] <= PANEL and weight_parts == 1:
        cuts.insert(0, (3, _STEPS[0]))
    folding = (True, False) if long and weight_parts == 1 else (False,)
    for (consumers, keys), folds, stages in product(cuts, folding, _STAGES):
        rows = ROWS_OF_CONSUMER * consumers
        shared = 2 * parts * (widths[0] * rows + stages * keys * sum(widths)) + 4 * folds * rows * widths[1] + _OTHER_BYTES
        sums = widths[1] // 2 * weight_parts  # with those that are added up
        registers = sums + keys // 2 + weight_parts * keys // 4
        if shared <= _SHARED_BYTES and registers <= _REGISTERS and (weight_parts == 1 or RESTARTED_KEYS % keys == 0):
            span = _LONG_SPAN if folds else FOLDED_KEYS
            return Tuning(consumers, keys, stages, numbers, folds, span, shared)
    raise ValueError(f"D = {head_dim}, Dv = {value_dim}: expected {MOST_COLUMNS[weight_parts]} at most")


@cache
def reducing_tuning(head_dim: int, numbers: Numbers, reductions: Reductions, *, plain: bool) -> Tuning:
    """The tuning for D = head_dim where weights are reduced and not multiplied; `plain` as above."""
    width = round_up(head_dim, PANEL)
    for (consumers, keys), stages in product(_REDUCED_CUTS[not plain :], _STAGES):
        rows = ROWS_OF_CONSUMER * consumers
        loaded = 2 * numbers.parts * width * (rows + stages * keys)
        shared = loaded + reductions.shared_bytes(consumers, rows, keys) + _OTHER_BYTES
        if shared <= _SHARED_BYTES:
            return Tuning(consumers, keys, stages, numbers, False, _LONG_SPAN, shared)
    raise ValueError(f"D = {head_dim}: expected {MOST_COLUMNS[numbers.parts]} at most")
