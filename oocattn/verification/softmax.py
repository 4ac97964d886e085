"""softmax(scores) v of some rows in float64: of a tile of keys by itself, and tiles merged in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem
from oocattn.verification.allowance import Allowances
from oocattn.verification.attended import AttendedKeys, Int64s
from oocattn.verification.error_sums import ErrorSums, PartialSums
from oocattn.verification.products import dot, multiply, weigh
from oocattn.verification.rounding import UNIT, TileErrors, see_sinks

Array64 = npt.NDArray[np.float64]

BUFFERS = 5  # numbers of each score of a tile that are held at a time: the score, its weight, and what is known of its error


@dataclass(frozen=True)
class Rows:
    """Some query rows of one head group: `query` [rows, D], the keys at which they are, and the terms of their heads.

    `slopes` and `sinks` are ALiBi slopes and learnable sinks [rows], None where there are none.
    """

    query: Array64
    positions: Int64s
    slopes: Array64 | None
    sinks: Array64 | None


@dataclass(frozen=True)
class Tile:
    """Keys [start, stop) of those that any of some rows attends; `seen` of these come before, in `number` tiles."""

    number: int
    start: int
    stop: int
    seen: int

    @classmethod
    def all_of(cls, attended: AttendedKeys, keys: int) -> Iterator[Tile]:
        """The tiles of all keys that are attended, of at most so many."""
        seen = 0
        for number, (start, stop) in enumerate(attended.tiles(keys)):
            yield cls(number, start, stop, seen)
            seen += stop - start

    def steps(self) -> Iterator[tuple[slice, bool]]:
        """Cut it where partial sums are taken (True), about 16 of them in each doubling of the keys."""
        first, last = self.seen, self.seen + self.stop - self.start
        while first < last:
            step = max(16, 1 << max(0, first.bit_length() - 5))
            border = (first // step + 1) * step
            stop = min(border, last)
            yield slice(first - self.seen, stop - self.seen), stop == border
            first = stop


def most_borders(keys: int) -> int:
    """At how many places a tile of so many keys is cut to take partial sums, at most."""
    return 1 + min(keys // 16, 32 + 16 * max(0, (keys - 1).bit_length() - 9))


@dataclass(frozen=True)
class PartialSum:
    """Sums over the keys of a tile before key `stop`: of weight times value, of weight times |value|, and of weights."""

    stop: int
    num: Array64
    size: Array64
    den: Array64


@dataclass(frozen=True)
class TileSums:
    """Sums over a tile of keys, of weights exp(score - `maximum`), where that is finite: its own largest scores [rows].

    `special` [rows, Dv] are the sums of the values that are NaN or Inf, `num` those of the others, `partial` those up to
    where partial sums are taken.
    """

    maximum: Array64
    num: Array64
    special: Array64
    size: Array64
    den: Array64
    partial: Sequence[PartialSum]
    errors: ErrorSums


@dataclass(frozen=True)
class Sums:
    """Rows in float64: `out` [rows, Dv], lse, the sum of weight times |value|, and what float32 may lose of out and lse.

    `chance` is the norm that `out` would have by chance, with signs of values drawn at random; 0 where weights are not
    rounded.
    """

    out: Array64
    lse: Array64
    size: Array64
    chance: Array64
    allowed: Array64
    allowed_lse: Array64


class TileSoftmax:
    """The sums of some rows of one head group over a tile of keys, which it attends in BUFFERS `buffers` of [rows * keys].

    The keys and values that are passed are overwritten.
    """

    def __init__(
        self,
        problem: Problem,
        rows: Rows,
        attended: AttendedKeys,
        tile: Tile,
        weight_roundoff: float,
        buffers: Sequence[Array64],
    ) -> None:
        members, keys = len(rows.query), tile.stop - tile.start
        self._problem, self._rows, self._tile = problem, rows, tile
        self._scores, self._weights, *others = (buffer[: members * keys].reshape(members, keys) for buffer in buffers)
        self._hidden = attended.hidden(tile.start, tile.stop)
        self._errors = TileErrors(rows.query, problem.scale, problem.value_dim, weight_roundoff, others)

    def weigh(self, key: Array64, occurrences: Array64, bias: Array64 | None) -> None:
        """Attend the keys [n, D] of the tile, with a bias [rows or 1, n]: the scores become weights.

        `occurrences` [n] says which occurrence of itself each key is.
        """
        scores, weights = self._scores, self._weights
        multiply(self._rows.query, key, out=scores)
        scores *= self._problem.scale
        self._errors.see_products(key, occurrences, scores, self._hidden)
        self._add_terms(bias)
        if self._hidden is not None:
            np.copyto(scores, -np.inf, where=self._hidden)
        self._errors.see_scores(scores)
        self._maximum = scores.max(axis=1)
        shift = finite_shift(self._maximum)
        np.subtract(scores, shift[:, None], out=weights)
        np.exp(weights, out=weights)
        self._errors.see_weights(scores, weights, shift)

    def add(self, value: Array64) -> TileSums:
        """Add the values [n, Dv] of the keys that were weighed, and return what comes of the tile."""
        lengths = np.einsum("nd,nd->n", value, value)
        special = np.zeros((len(self._weights), value.shape[1]))
        if not np.isfinite(lengths).all():
            self._take_special(value, special)
            np.einsum("nd,nd->n", value, value, out=lengths)
        np.sqrt(lengths, out=lengths)
        num, size, den = np.zeros_like(special), np.zeros(len(special)), np.zeros(len(special))
        partial = []
        for keys, ends in self._tile.steps():
            weights = self._weights[:, keys]
            num += weigh(weights, value[keys])
            size += dot(weights, lengths[keys])
            den += weights.sum(axis=1)
            if ends:
                partial.append(PartialSum(self._tile.start + keys.stop, num.copy(), size.copy(), den.copy()))
        self._errors.see_values(self._weights, value, lengths, self._hidden)
        return TileSums(self._maximum, num, special, size, den, partial, self._errors.sums)

    def _add_terms(self, bias: Array64 | None) -> None:
        """Cap the scores and add what is added to them, in place."""
        scores, softcap = self._scores, self._problem.softcap
        if softcap is not None:
            self._errors.see_cap(scores, softcap)
            scores /= softcap
            np.tanh(scores, out=scores)
            scores *= softcap
        if self._rows.slopes is not None:
            keys = np.arange(self._tile.start, self._tile.stop)
            distances = np.subtract.outer(self._rows.positions, keys).astype(np.float64)
            np.abs(distances, out=distances)
            distances *= -self._rows.slopes[:, None]
            scores += distances
            self._errors.see_bias(distances, scores)
        if bias is not None:
            scores += bias
            self._errors.see_bias(bias, scores)

    def _take_special(self, value: Array64, found: Array64) -> None:
        """Sum NaN and Inf, which become 0, into `found` [rows, Dv]. A row has none of those that it does not attend."""
        special = ~np.isfinite(value)
        of_special = np.flatnonzero(special.any(axis=1))
        values = np.where(special[of_special], value[of_special], 0.0)
        for row in range(len(found)):
            met = slice(None) if self._hidden is None else ~self._hidden[row, of_special]
            found[row] = weigh(self._weights[row : row + 1, of_special][:, met], values[met])[0]
        value[special] = 0.0


class Softmax:
    """Sums over all keys of some rows of one head group: those of tiles, merged in their order."""

    def __init__(self, problem: Problem, rows: Rows, attended: AttendedKeys, weight_roundoff: float) -> None:
        members = len(rows.query)
        self._end, self._attended, self._weight_roundoff = problem.keys, attended, weight_roundoff
        self._num, self._special = (np.zeros((members, problem.value_dim)) for _ in range(2))
        self._size, self._den = np.zeros(members), np.zeros(members)
        self._maximum, self._of_sinks = np.full(members, -np.inf), np.zeros(members)
        self._errors = ErrorSums(members, problem.value_dim, weight_roundoff > UNIT)
        self._partials = PartialSums(members, problem.value_dim)
        if rows.sinks is not None:
            self._maximum, self._of_sinks = rows.sinks.copy(), np.ones(members)
            see_sinks(self._errors, rows.sinks)
        self._counted = 0  # the key up to which a partial sum has been taken

    def merge(self, tile: TileSums) -> None:
        """Take the sums over the next tile."""
        risen = np.maximum(self._maximum, tile.maximum)
        shift = finite_shift(risen)
        kept, added = np.exp(self._maximum - shift), np.exp(tile.maximum - shift)
        self._maximum = risen
        for sums in (self._num, self._special, self._size, self._den, self._of_sinks):
            sums *= kept[:, None] if sums.ndim == 2 else kept
        self._partials.scale(kept)
        for part in tile.partial:
            num = self._num + part.num * added[:, None]
            self._take_partial_sum(part.stop, num, self._size + part.size * added, self._den + part.den * added)
        for sums, more in ((self._num, tile.num), (self._special, tile.special)):
            sums += more * added[:, None]
        self._size += tile.size * added
        self._den += tile.den * added
        self._errors.merge(tile.errors, kept, added)

    def sums(self) -> Sums:
        """What has come of the rows."""
        self._take_partial_sum(self._end, self._num, self._size, self._den)
        keys, total = self._attended.count(0, self._end), self._den + self._of_sinks
        den = np.where(total == 0, 1.0, total)  # no key, or every score is -inf: out is 0
        out = (self._num + self._special) / den[:, None]
        lse = self._maximum + np.log(total)
        allowances = Allowances(self._errors, self._partials, self._weight_roundoff)
        allowed = allowances.of(out, lse, self._maximum, total, self._den / den, self._size, keys)
        size, chance = (np.nan_to_num(each / den) for each in (self._size, np.sqrt(self._errors.by_chance)))
        return Sums(out, lse, size, chance, allowed.out, allowed.lse)

    def _take_partial_sum(self, stop: int, num: Array64, size: Array64, den: Array64) -> None:
        """Sums over the keys before `stop` stand for those since the last call."""
        self._partials.take(num, size, den, self._attended.count(self._counted, stop))
        self._counted = stop


def finite_shift(maximum: Array64) -> Array64:
    """What is subtracted from scores whose largest are these [rows]: 0 where there is none, so that no NaN comes of it."""
    found: Array64 = np.where(np.isneginf(maximum), 0.0, maximum)
    return found
