"""Calls with random masks and terms on the GPU, and their result by a dense mask in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from on_gpu import CUDA
from random_masks import random_edges, random_part, scores_of

from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores


def random_mask(rng: random.Random, largest: int = 1500) -> Mask:
    """A mask with any of documents, causality, window, prefix and sinks."""
    queries, keys = rng.randint(1, largest), rng.randint(1, largest)
    documents = rng.choice([1, 1, 2, 5, 40])
    options = {
        "causal": rng.random() < 0.5,
        "left": rng.choice([None, 0, 1, 17, 130, 700]),
        "right": rng.choice([None, 0, 3, 200]),
        "prefix": rng.choice([0, 0, 1, 50, 400]),
        "sinks": rng.choice([0, 0, 4, 150]),
    }
    edges = random_edges(rng, documents, queries), random_edges(rng, documents, keys)
    if rng.random() < 0.3:
        edges = edges[0], edges[0]
    return Mask(*edges, **options)


def random_intervals(rng: random.Random, mask: Mask) -> Intervals:
    """The intervals of a part of the rows and keys of a mask."""
    return make_intervals(mask, random_part(rng, mask.queries), random_part(rng, mask.keys))


@dataclass(frozen=True)
class Terms:
    """Terms of a score beside its scale; `bias`: "one" row of it, one of "each" head, or None."""

    softcap: float | None = None
    slopes: bool = False
    bias: str | None = None


def make_operands(
    intervals: Intervals | None, heads: int, dims: tuple[int, int], dtype: str, terms: Terms, seed: int = 0, size=None
) -> Operands:
    """Standard normal rows."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    rows, keys = size or (intervals.rows, intervals.keys)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=CUDA, generator=generator)

    query, key, value = (
        normal(*shape).to(getattr(torch, dtype)) for shape in ((heads, rows, dims[0]), (keys, dims[0]), (keys, dims[1]))
    )
    slopes = tuple(0.5 / (head + 1) for head in range(heads)) if terms.slopes else None
    bias = None if terms.bias is None else normal(heads if terms.bias == "each" else 1, keys)
    scores = Scores(dims[0] ** -0.5, terms.softcap)
    return Operands(query, key, value, scores, intervals, slopes, bias)


def attended(intervals: Intervals) -> torch.Tensor:
    """Which keys each row attends: bool [n, m]."""
    a, b, c, d = torch.from_numpy(intervals.values()).to(CUDA).unsqueeze(-1).unbind(1)
    key = torch.arange(intervals.keys, device=CUDA)
    return ((a <= key) & (key < b)) | ((c <= key) & (key < d))


def dense_scores(operands: Operands) -> torch.Tensor:
    """The scores of all pairs [g, n, m] in float64, -inf where a row does not attend a key."""
    intervals = operands.intervals
    if intervals is None:
        return scores_of(operands, torch.ones(operands.rows, operands.keys, dtype=torch.bool, device=CUDA), None)
    position = torch.from_numpy(intervals.positions()).to(CUDA).unsqueeze(-1)
    return scores_of(operands, attended(intervals), position - torch.arange(operands.keys, device=CUDA))


def by_dense_mask(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """out [g, n, Dv] and lse [g, n] in float64."""
    scores = dense_scores(operands)
    return scores.softmax(-1).nan_to_num(0.0) @ operands.value.double(), scores.logsumexp(-1)
