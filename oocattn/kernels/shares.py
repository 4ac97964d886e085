"""Shares of a call over packed documents: rows that one thread attends by itself, whatever the others do.

A library divides each of its calls among threads, which wait for each other at the end of it: several times for every
document, and long where other processes use the cores too. Documents have no row in common, so threads need not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch

from oocattn.kernels.intervals import Intervals
from oocattn.plain_threads import plain_threads
from oocattn.units import ceil_div, round_up

S = TypeVar("S")

_QUANTUM = 256  # rows of a part of a long document: a multiple of them, as the library's largest blocks


class Share(NamedTuple):
    """Rows of a call, the keys from the first to the last that any of them attends, and the pairs of both."""

    rows: range
    keys: range
    pairs: int


def make_shares(intervals: Intervals, most_rows: int) -> list[Share]:
    """The shares of a call, of at most so many rows each; those with most work come first, and rows without keys nowhere."""
    shares: list[Share] = []
    for rows in _cut(intervals.bounds.edges.tolist(), most_rows):
        bounds = intervals.bounds.part(rows)
        if live := bounds.live_keys():
            shares.append(Share(rows, range(live[0].start, live[-1].stop), int(bounds.pairs().sum())))
    return sorted(shares, key=lambda share: -share.pairs)


def attend_shares(shares: Sequence[S], attend: Callable[[S], object], *, one_core: bool = False) -> None:
    """Have shares attended by as many threads as torch uses here, each on one core.

    A single share has all of torch's threads, unless it is for `one_core` as well.
    """
    cores = torch.get_num_threads()
    count = min(cores, len(shares))
    if count <= 1 and not (one_core and cores > 1 and shares):
        for share in shares:
            attend(share)
        return
    with plain_threads(count, "oocattn-share", 1) as threads:
        begun = [threads.submit(attend, share) for share in shares]
        wait(begun)  # no thread writes to the state any more when one has failed
    for future in begun:
        future.result()


def _cut(edges: list[int], most: int) -> Iterator[range]:
    """Rows of consecutive documents, or of an equal part of one that has too many."""
    first = edges[0]
    for start, stop in pairwise(edges):
        if stop - first <= most:
            continue
        if first < start:
            yield range(first, start)
            first = start
        if stop - start > most:
            step = round_up(ceil_div(stop - start, ceil_div(stop - start, most)), _QUANTUM)
            for row in range(start, stop, step):
                yield range(row, min(row + step, stop))
            first = stop
    if first < edges[-1]:
        yield range(first, edges[-1])
