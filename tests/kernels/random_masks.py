"""Random masks and terms for the kernels of a CPU, each from its seed, and their result by a dense mask in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from exact import DTYPES
from reference import Bools, mask_by_definition

from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores

Pairs = np.ndarray | torch.Tensor


def random_edges(random_: random.Random, documents: int, total: int) -> np.ndarray:
    """Boundaries of documents, of which some may be empty."""
    return np.array([0, *sorted(random_.choices(range(total + 1), k=documents - 1)), total])


def random_part(random_: random.Random, total: int) -> range:
    """All of them, or some."""
    if random_.random() < 0.4:
        return range(total)
    start = random_.randrange(total)
    return range(start, random_.randint(start + 1, total))


def random_mask(random_: random.Random, largest: int, windows: Sequence[int]) -> tuple[Mask, Bools, np.ndarray]:
    """A mask with any of documents, causality, window, prefix and sinks; what it is by definition, and distances."""
    sizes = random_.randint(1, largest), random_.randint(1, largest)
    documents = random_.choice([1, 1, 2, 5, 30])
    edges = [random_edges(random_, documents, size) for size in sizes]
    if random_.random() < 0.4:
        edges[1] = edges[0]
    causal, prefix, sinks = random_.random() < 0.5, random_.choice([0, 0, 1, 3, 150]), random_.choice([0, 0, 1, 3, 150])
    left, right = (random_.choice([None, *windows]) for _ in range(2))
    mask = Mask(*edges, causal=causal, left=left, right=right, prefix=prefix, sinks=sinks)
    (attended,), (distances,) = mask_by_definition(
        1, mask.queries, mask.keys, causal=causal, window_size=(left, right), cu_seqlens_q=edges[0], cu_seqlens_k=edges[1],
        prefix=prefix, sink_tokens=sinks,
    )  # fmt: skip
    return mask, attended, distances


def random_intervals(random_: random.Random, largest: int, windows: Sequence[int]) -> tuple[Intervals, Bools]:
    """The intervals of some rows and keys of a random mask, and what they are by definition."""
    while True:
        mask, attended, _ = random_mask(random_, largest, windows)
        if mask.queries and mask.keys:
            rows, keys = random_part(random_, mask.queries), random_part(random_, mask.keys)
            return make_intervals(mask, rows, keys), attended[rows.start : rows.stop, keys.start : keys.stop]


def random_call(random_: random.Random, largest: int = 1200) -> tuple[Operands, torch.Tensor, torch.Tensor]:
    """Operands with a random mask, terms, heads, dtype and dimensions; their scores [g, n, m] and values in float64."""
    mask, attended, distances = random_mask(random_, largest, (0, 1, 6, 70, 140, 300, 700))
    rows, keys = random_part(random_, mask.queries), random_part(random_, max(1, mask.keys))
    keys = range(keys.start, min(keys.stop, mask.keys))
    heads, head_dim = random_.choice([1, 1, 2, 5]), random_.choice([1, 8, 33, 64, 128])
    value_dim, dtype = random_.choice([head_dim, head_dim, 5, 160]), random_.choice(DTYPES)
    generator = torch.Generator().manual_seed(random_.randrange(1 << 30))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = (heads, len(rows), head_dim), (len(keys), head_dim), (len(keys), value_dim)
    tensors = (normal(*shape).to(dtype) for shape in shapes)
    scores = Scores(random_.choice([0.1, head_dim**-0.5]))
    call = Operands(*tensors, scores, make_intervals(mask, rows, keys))
    if random_.random() < 0.5:
        cap = random_.choice([None, 0.5, 20.0])
        slopes = random_.choice([None, tuple(random_.choice([0.0, 0.01, 0.5, -0.02]) for _ in range(heads))])
        bias = random_.choice([None, normal(1, len(keys)), normal(heads, len(keys))])
        call = replace(call, scores=replace(scores, softcap=cap), slopes=slopes, key_bias=bias)
    part = np.ix_(rows, keys)
    return call, scores_of(call, attended[part], distances[part]), call.value.double()


def scores_of(call: Operands, attended: Pairs, distances: Pairs | None) -> torch.Tensor:
    """The scores of all pairs in float64, -inf where a row does not attend a key: [g, n, m]. Slopes need `distances`."""
    scores = call.scores.scale * (call.query.double() @ call.key.double().T)
    if call.scores.softcap is not None:
        scores = call.scores.softcap * torch.tanh(scores / call.scores.softcap)
    if call.slopes is not None:
        slopes = torch.tensor(call.slopes, dtype=torch.float64, device=scores.device)[:, None, None]
        scores = scores - slopes * torch.as_tensor(distances, device=scores.device).abs()
    if call.key_bias is not None:
        scores = scores + call.key_bias.double().unsqueeze(1)
    return scores.masked_fill(~torch.as_tensor(attended, device=scores.device), -math.inf)
