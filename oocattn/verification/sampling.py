"""Which rows are recomputed: ends, borders of chunks and documents, rows where the mask turns, and random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem

StratumName = Literal["first", "last", "border", "document", "mask", "uniform"]

STRATA: tuple[StratumName, ...] = get_args(StratumName)
"""First and last row of a head; both sides of a border between chunks; first and last row of a document, or of a batch entry
with its own number of keys; both sides of a turn of the mask; uniform over all (batch, head, row)."""

SHARE = 4
"""At most one row of four is chosen by its place (but the last row and the first if there are two or three)."""

CONFIDENCE = 0.95

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class SampledRow:
    """One row of a result, and the strata it was sampled for: `head` and `token` are its places in `out`."""

    batch: int
    head: int
    token: int
    strata: tuple[StratumName, ...]


def sample_rows(problem: Problem, borders: Sequence[int], rows: int, seed: int) -> list[SampledRow]:
    """Draw at most `rows` distinct rows of `out`, in the order of heads and rows.

    `borders` are the first rows of all chunks but one. Rows chosen by their place take heads in turn. The others are
    drawn uniformly without replacement, whatever was chosen before: a row may be in several strata.
    """
    random = np.random.default_rng(seed)
    heads = problem.batch * problem.out_heads
    most = min(rows - 1, max(2, rows // SHARE))
    chosen = list(islice(_by_place(problem, borders, most, random), most))
    first = int(random.integers(heads))
    strata: dict[int, list[StratumName]] = {}  # of row head * out_rows + token
    for turn, place in enumerate(chosen):
        head = (first + turn) % heads
        if place.batch is not None:
            head = place.batch * problem.out_heads + head % problem.out_heads
        strata.setdefault(head * problem.out_rows + place.token, []).append(place.stratum)
    for row in random.choice(problem.rows, min(rows - len(chosen), problem.rows), replace=False):
        strata.setdefault(int(row), []).append("uniform")
    found = []
    for row, names in strata.items():
        head, token = divmod(row, problem.out_rows)
        found.append(SampledRow(*divmod(head, problem.out_heads), token, tuple(dict.fromkeys(names))))
    return sorted(found)


@dataclass(frozen=True)
class _Place:
    """A row of `out` of any head, and of a batch entry where that matters."""

    stratum: StratumName
    token: int
    batch: int | None = None


def _by_place(problem: Problem, borders: Sequence[int], most: int, random: np.random.Generator) -> Iterator[_Place]:
    """Rows to look at. Borders, documents and turns of the mask have equal shares of `most`, as far as there are so many."""
    yield from (_Place("last", problem.out_rows - 1), _Place("first", 0))
    documents = _Documents(problem)
    counts: dict[StratumName, int] = {"mask": len(documents.turns), "document": documents.count, "border": len(borders)}
    pairs = max(0, most - 2) // 2
    for kinds, (stratum, count) in zip((3, 2, 1), sorted(counts.items(), key=lambda item: item[1]), strict=True):
        share = min(pairs // kinds, count)
        pairs -= share
        if stratum == "document":
            yield from documents.ends(share, random)
            continue
        for index in sorted(random.choice(count, share, replace=False).tolist()) if share else ():
            if stratum == "mask":
                yield from documents.turn(index, random)
            else:
                yield from (_Place("border", borders[index] - 1), _Place("border", borders[index]))


class _Documents:
    """The documents that rows of `out` are in, and the turns that the mask takes in them; all arrays are [documents].

    Batch entries that have each their number of keys count as documents.
    """

    def __init__(self, problem: Problem) -> None:
        given, (start, stop) = problem.given, problem.rows_asked
        queries, keys = np.array([0, problem.queries]), np.array([problem.keys])
        self._batch: Int64s | None = None
        if given.cu_seqlens_q is not None:
            queries = given.cu_seqlens_q
            keys = np.diff(queries if given.cu_seqlens_k is None else given.cu_seqlens_k)
        elif given.seqused_k is not None:
            keys, self._batch = given.seqused_k, np.arange(problem.batch)
        first, end = np.broadcast_to(queries[:-1], keys.shape), np.broadcast_to(queries[1:], keys.shape)
        kept = np.flatnonzero(np.maximum(first, start) < np.minimum(end, stop))
        self._keys, self._aligned = keys[kept], end[kept] - keys[kept] - start  # the row at the document's first key
        self._first, self._last = (bound[kept].clip(start, stop - 1) - start for bound in (first, end - 1))
        self._batch = None if self._batch is None else self._batch[kept]
        self.count = len(kept) if len(keys) > 1 else 0
        self.turns = [rows for rows in self._turns_of(problem) if self._taken(rows).any()]
        """Of each turn, the row that it makes different from the one before."""

    def ends(self, count: int, random: np.random.Generator) -> Iterator[_Place]:
        """First and last rows of `count` documents, one of them without keys where there is one."""
        chosen = random.choice(self.count, count, replace=False) if count else np.empty(0, np.int64)
        empty = np.flatnonzero(self._keys == 0)
        if len(empty) and count and self._keys[chosen].all():
            chosen[0] = random.choice(empty)
        for document in sorted(chosen.tolist()):
            rows = (int(self._first[document]), int(self._last[document]))
            yield from (self._place("document", row, document) for row in dict.fromkeys(rows))

    def turn(self, index: int, random: np.random.Generator) -> Iterator[_Place]:
        """The rows before and after a turn, in any document that has both."""
        rows = self.turns[index]
        document = int(random.choice(np.flatnonzero(self._taken(rows))))
        yield from (self._place("mask", int(rows[document]) + side, document) for side in (-1, 0))

    def _turns_of(self, problem: Problem) -> Iterator[Int64s]:
        farthest = problem.queries + problem.keys
        left, right = (None if side is None else min(side, farthest) for side in problem.window_size)
        after = 0 if problem.causal else right
        if after is not None:
            yield self._aligned - after  # the first row with a key
        if right is not None and not problem.causal:
            yield self._aligned + self._keys - 1 - right  # the first with the last key
        if left is not None:
            yield self._aligned + left + 1  # the first without the first key
            yield self._aligned + left + 1 + min(problem.sink_tokens, farthest)  # the first with a hole
        if problem.prefix:
            yield self._aligned + min(problem.prefix, farthest)  # the first that attends more

    def _taken(self, rows: Int64s) -> npt.NDArray[np.bool_]:
        """The documents in which this row and the one before are."""
        return (rows > self._first) & (rows <= self._last)

    def _place(self, stratum: StratumName, row: int, document: int) -> _Place:
        return _Place(stratum, row, None if self._batch is None else int(self._batch[document]))


def share_bound(drawn: int) -> float:
    """The most rows that are wrong, as a share, where of `drawn` rows none was.

    With 95% confidence: if a share p were wrong, n right rows would come with a probability of at most (1 - p)^n: 1 -
    0.05^(1/n) solves that for 5%, a little less than 3/n, the "rule of three" (Hanley and Lippman-Hand, JAMA 249:1743,
    1983).
    """
    return float(-np.expm1(np.log(1 - CONFIDENCE) / drawn))
