"""Reductions of softmax weights: a new one is a file, and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oocattn.kernels.reductions.base import KeyReduction, MakeReduction, Reduction, RowReduction
from oocattn.kernels.reductions.entropy import Entropy
from oocattn.kernels.reductions.pooled import Pooled
from oocattn.kernels.reductions.received import Received
from oocattn.kernels.reductions.top_keys import TopKeys
from oocattn.problem.second_pass import Reduced

REDUCTIONS: Mapping[str, MakeReduction] = {
    "received": lambda _: Received(),
    "entropy": lambda _: Entropy(),
    "top_keys": lambda asked: TopKeys(*asked.numbers),
    "pooled": lambda asked: Pooled(*asked.numbers),
}
"""By the name under which each is asked for, made of its numbers."""


def make_reduction(asked: Reduced) -> Reduction:
    """The reduction that is asked for."""
    return REDUCTIONS[asked.name](asked)


def reductions_of(asked: Sequence[Reduced]) -> tuple[list[tuple[RowReduction, int]], list[KeyReduction]]:
    """The reductions along keys, each with its columns, and those along rows, that are asked for."""
    made = [(make_reduction(each), each.columns) for each in asked]
    along_keys = [(each, columns) for each, columns in made if isinstance(each, RowReduction)]
    return along_keys, [each for each, _ in made if isinstance(each, KeyReduction)]
