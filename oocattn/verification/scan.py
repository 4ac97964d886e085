"""Every row of a result beside a second pass over its pairs, in several threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from oocattn.plain_threads import plain_threads
from oocattn.problem.problem import Problem
from oocattn.threads import map_in_order
from oocattn.units import ceil_div
from oocattn.verification.attended import Int64s
from oocattn.verification.blocks import AHEAD, Block, BlockReader, Compared
from oocattn.verification.differences import Differences
from oocattn.verification.noise import KeyTerms

Place = tuple[int, int]  # batch entry and head
Each = Callable[..., Iterator[Any]]  # begins calls of a function in other threads, and yields what they return, in order


def find_differences(given: Compared, block_rows: int, threads: int, most: int) -> Differences:
    """Compare every row of a result, in so many threads that have blocks of `block_rows` rows; keep the `most` worst.

    What is found does not depend on the threads. Raises IntegrityError where the pass cannot be read.
    """
    found, heads = Differences(most), list(_Head.all_of(given.problem))
    reader = BlockReader(given, block_rows, most)
    with plain_threads(threads, "oocattn-compare", 1) as pool:
        each = partial(map_in_order, pool, ahead=AHEAD * threads)
        norms = _measure(reader, sorted({head.of_keys for head in heads}), given.problem.keys, block_rows, each)
        for _, alike in itertools.groupby(heads, attrgetter("of_bias")):
            for differences in _compare(given, reader, list(alike), norms, block_rows, each):
                found.add(differences)
    return found


@dataclass(frozen=True)
class _Head:
    """A head of `out`, and the heads of keys and of the key bias that go with it."""

    batch: int
    head: int
    of_keys: Place
    of_bias: Place | None

    @classmethod
    def all_of(cls, problem: Problem) -> Iterator[_Head]:
        group = problem.query_heads // problem.kv_heads
        for batch, head in itertools.product(range(problem.batch), range(problem.out_heads)):
            query_head = head if problem.heads is None else problem.heads[head]
            of_bias = (batch, query_head % problem.bias_heads) if problem.bias_heads else None
            yield cls(batch, head, (batch, query_head // group), of_bias)


def _measure(
    reader: BlockReader, heads: Sequence[Place], keys: int, block_rows: int, each: Each
) -> dict[Place, tuple[float, float]]:
    """The norm of the longest key of heads, and the mean square of the norms of values, of those that are finite."""
    calls = ((name, block) for head in heads for name in "kv" for block in Block.all_of(*head, keys, block_rows))
    measured, blocks, found = each(reader.measure, calls), ceil_div(keys, block_rows), {}
    for head in heads:
        longest = max(norms.largest for norms in itertools.islice(measured, blocks))
        total, rows = 0.0, 0
        for norms in itertools.islice(measured, blocks):
            total, rows = total + norms.total, rows + norms.rows
        found[head] = math.sqrt(longest), total / max(1, rows)
    return found


def _compare(
    given: Compared,
    reader: BlockReader,
    heads: Sequence[_Head],
    norms: Mapping[Place, tuple[float, float]],
    block_rows: int,
    each: Each,
) -> Iterator[Differences]:
    """What is found in the rows of heads, which have the same key bias."""
    of_bias = heads[0].of_bias
    bias = (0.0, None) if of_bias is None else _read_bias(given, *of_bias)
    yield from each(
        reader.compare,
        (
            (block, KeyTerms(*norms[head.of_keys], *bias))
            for head in heads
            for block in Block.all_of(head.batch, head.head, given.problem.out_rows, block_rows)
        ),
    )


def _read_bias(given: Compared, batch: int, bias_head: int) -> tuple[float, Int64s | None]:
    """The largest size of a bias of a head, and the keys that are shut, as of `KeyTerms`."""
    bias = np.empty(given.problem.keys, np.float32)
    given.dataset.arrays["key_bias"].read_rows(batch, bias_head, 0, len(bias), bias)
    largest = float(np.max(np.abs(bias), initial=0.0, where=np.isfinite(bias)))
    closed = np.isneginf(bias)
    del bias
    return largest, np.concatenate([[0], np.cumsum(closed)]) if closed.any() else None
