"""Every row of a result beside a second pass over its pairs, in several threads."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from queue import SimpleQueue
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


class Comparison:
    """Every row of a result beside a second pass, by blocks of `block_rows` rows that are compared in any order.

    The `most` rows that differ most are kept. What is `found` depends neither on the order nor on threads.
    """

    def __init__(self, problem: Problem, block_rows: int, most: int) -> None:
        self.found, self.block_rows = Differences(most), block_rows
        self._problem, self._most = problem, most
        self._norms: dict[Place, tuple[float, float]] | None = None
        self._compared = set[Block]()

    def compare_written(self, given: Compared, threads: int, written: Iterable[Block]) -> None:
        """Compare blocks that are written as they come, in so many threads, while the pass goes on.

        Raises IntegrityError where one cannot be read. It is left, as all that come after it.
        """
        for block, differences in self._compare(given, threads, written):
            self.found.add(differences)
            self._compared.add(block)

    def compare_rest(self, given: Compared, threads: int) -> Differences:
        """Compare what is left, when the pass is done. Raises IntegrityError where the pass cannot be read."""
        problem, rows = self._problem, self.block_rows
        blocks = itertools.chain.from_iterable(
            Block.all_of(batch, head, problem.out_rows, rows)
            for batch, head in itertools.product(range(problem.batch), range(problem.out_heads))
        )
        for _, differences in self._compare(given, threads, itertools.filterfalse(self._compared.__contains__, blocks)):
            self.found.add(differences)
        return self.found

    def _compare(self, given: Compared, threads: int, blocks: Iterable[Block]) -> Iterator[tuple[Block, Differences]]:
        """What is found in blocks, one after another."""
        reader = BlockReader(given, self.block_rows, self._most)

        def compare(block: Block, keys: KeyTerms) -> tuple[Block, Differences]:
            return block, reader.compare(block, keys)

        with plain_threads(threads, "oocattn-compare", 1) as pool:
            each = partial(map_in_order, pool, ahead=AHEAD * threads)
            if self._norms is None:
                self._norms = self._measure(reader, each)
            for of_bias, alike in itertools.groupby(blocks, self._bias_of):
                bias = (0.0, None) if of_bias is None else _read_bias(given, *of_bias)
                yield from each(compare, ((block, KeyTerms(*self._norms[self._keys_of(block)], *bias)) for block in alike))

    def _measure(self, reader: BlockReader, each: Each) -> dict[Place, tuple[float, float]]:
        """The norm of the longest key of heads, and the mean square of the norms of values, of those that are finite."""
        problem, rows = self._problem, self.block_rows
        heads = sorted(
            {self._keys_of(Block(batch, head, 0, 0)) for batch in range(problem.batch) for head in range(problem.out_heads)}
        )
        calls = ((name, block) for head in heads for name in "kv" for block in Block.all_of(*head, problem.keys, rows))
        measured, blocks, found = each(reader.measure, calls), ceil_div(problem.keys, rows), {}
        for head in heads:
            longest = max(norms.largest for norms in itertools.islice(measured, blocks))
            total, count = 0.0, 0
            for norms in itertools.islice(measured, blocks):
                total, count = total + norms.total, count + norms.rows
            found[head] = math.sqrt(longest), total / max(1, count)
        return found

    def _query_head(self, block: Block) -> int:
        heads = self._problem.heads
        return block.head if heads is None else heads[block.head]

    def _keys_of(self, block: Block) -> Place:
        """The head of the keys that rows of `out` attend."""
        return block.batch, self._query_head(block) // (self._problem.query_heads // self._problem.kv_heads)

    def _bias_of(self, block: Block) -> Place | None:
        """The head of their key bias; None where there is none."""
        biases = self._problem.bias_heads
        return (block.batch, self._query_head(block) % biases) if biases else None


class WrittenRows:
    """Tells, while a second pass goes on, which blocks of its rows are written: to one thread, by another."""

    def __init__(self) -> None:
        self._told = SimpleQueue[tuple[int, int, range] | None]()

    def tell(self, batch: int, head: int, rows: range) -> None:
        """Say that some rows of a head of `out` are written, perhaps again."""
        self._told.put((batch, head, rows))

    def end(self) -> None:
        """Say that no more blocks are to be given out."""
        self._told.put(None)

    def blocks(self, block_rows: int, out_rows: int) -> Iterator[Block]:
        """Blocks of so many rows, each as soon as all of it is written; it waits for them until the end."""
        seen, counts = set[tuple[int, int, range]](), Counter[Block]()
        while (told := self._told.get()) is not None:
            if told in seen:
                continue
            seen.add(told)
            batch, head, rows = told
            for start in range(rows.start - rows.start % block_rows, rows.stop, block_rows):
                block = Block(batch, head, start, min(start + block_rows, out_rows))
                counts[block] += min(rows.stop, block.stop) - max(rows.start, start)
                if counts[block] == block.rows:
                    yield block


def _read_bias(given: Compared, batch: int, bias_head: int) -> tuple[float, Int64s | None]:
    """The largest size of a bias of a head, and the keys that are shut, as of `KeyTerms`."""
    bias = np.empty(given.problem.keys, np.float32)
    given.dataset.arrays["key_bias"].read_rows(batch, bias_head, 0, len(bias), bias)
    largest = float(np.max(np.abs(bias), initial=0.0, where=np.isfinite(bias)))
    closed = np.isneginf(bias)
    del bias
    return largest, np.concatenate([[0], np.cumsum(closed)]) if closed.any() else None
