"""Random problems of every kind that float32 has trouble with, and ways to compute them that are as good as torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from reference import mask_by_definition
from support import Arrays, numpy_type
from torch.nn.attention import SDPBackend, sdpa_kernel

KEYS = (
    "normal", "cosine times 100", "constant", "levels", "offset", "offset keys", "channels", "sigma 5", "q is k", "huge",
    "huge offset", "tiny", "few keys", "nearly equal", "zero", "sparse", "signs",
    "masked", "huge masked", "minus infinity",
)  # fmt: skip
VALUES = (
    "normal", "mean", "constant", "halves", "alternating", "by key", "tiny", "huge", "zero", "k", "mixed sizes",
)  # fmt: skip

Matrix = np.ndarray


@dataclass(frozen=True)
class Case:
    """One head: q [1, 1, Nq, D], k [1, 1, Nk, D] and v [1, 1, Nk, Dv], and how they are attended.

    `terms` are arguments of the problem besides `causal` and `scale`; `key_bias` is [1, 1, Nk].
    """

    keys: str
    values: str
    arrays: Arrays
    causal: bool
    scale: float
    terms: Mapping[str, Any] = field(default_factory=dict)
    key_bias: np.ndarray | None = None

    def __str__(self) -> str:
        q, _, v = self.arrays
        shapes = f"{self.keys}, values {self.values}: {q.shape[2:]} against {v.shape[2:]} {q.dtype}"
        bias = "" if self.key_bias is None else ", with a key bias"
        return f"{shapes}, causal {self.causal}, scale {self.scale}, {dict(self.terms)}{bias}"


def a_case(seed: int, most_tokens: int = 3000) -> Case:
    """The problem of a seed: half of them are full or causal squares without terms."""
    random = np.random.default_rng(seed)
    tokens = round(2 ** random.uniform(0, math.log2(most_tokens)))
    head_dim = int(random.choice([1, 2, 3, 8, 16, 31, 40, 64, 64, 80, 128, 128, 200, 256]))
    dtype = str(random.choice(["float32", "float32", "float16", "bfloat16"]))
    keys, values = str(random.choice(KEYS)), str(random.choice(VALUES))
    scale = float(random.choice([*3 * [head_dim**-0.5], 1.0, 0.05, 0.3]))
    q, k = _queries_and_keys(keys, tokens, head_dim, random)
    v = _values(values, k, random)
    most = 6e4 if dtype == "float16" else 3e38
    q, v = np.clip(q, -most, most), np.clip(v, -most, most)
    k = np.where(np.isinf(k), k, np.clip(k, -most, most))
    causal, bias, terms = bool(random.random() < 0.5), None, {}
    if random.random() < 0.5:
        queries, value_dim = random.integers(tokens) + 1, random.integers(head_dim) + 1
        q, v, terms = q[:queries], v[:, :value_dim], dict(_terms(tokens, random))
        bias = _bias(tokens, random) if random.random() < 0.4 else None
    arrays = tuple(array.astype(numpy_type(dtype))[None, None] for array in (q, k, v))
    return Case(keys, values, arrays, causal, scale, terms, bias)


def _terms(tokens: int, random: Generator) -> Iterator[tuple[str, Any]]:
    if random.random() < 0.4:
        yield "window_size", (int(random.integers(tokens)), int(random.integers(tokens)))
    if random.random() < 0.4:
        yield "softcap", float(random.choice([0.1, 2.0, 30.0, 1e3]))
    if random.random() < 0.4:
        yield "alibi_slopes", [float(random.choice([-1, 1, 1, 1]) * 2 ** random.uniform(-12, 1))]
    if random.random() < 0.3:
        yield "learnable_sink", [float(random.choice([-20.0, 0.0, 3.0, 100.0, 1e4]))]


def _bias(tokens: int, random: Generator) -> np.ndarray:
    masked = np.where((random.random(tokens) < 0.5) & (np.arange(tokens) > 0), random.choice([-1e4, -1e9, -np.inf]), 0)
    normal = random.standard_normal(tokens) * random.choice([1, 10, 1000])
    chosen: np.ndarray = (masked if random.random() < 0.3 else normal).astype(np.float32)[None, None]
    return chosen


def _queries_and_keys(kind: str, tokens: int, head_dim: int, random: Generator) -> tuple[Matrix, Matrix]:
    q, k = (random.standard_normal((tokens, head_dim)) for _ in range(2))
    ones = np.ones((tokens, head_dim))
    if kind == "cosine times 100":
        k *= 10 * head_dim**0.25 / (np.linalg.norm(k, axis=1, keepdims=True) + 1e-30)
        return k, k
    if kind == "q is k":
        return k * 5**0.5, k * 5**0.5
    if kind == "constant":
        return ones * q[0, 0] * random.choice([1, 5, 30]), ones * k[0, 0] * random.choice([1, 5, 30])
    if kind == "levels":
        return ones * q[:, :1] * 5, ones * k[:, :1]
    if kind == "channels":
        offset = np.where(random.random(head_dim) < 0.1, 30, 0) * random.choice([-1, 1], head_dim)
        return q + offset, k + offset * random.choice([-1, 1], head_dim)
    if kind == "few keys":
        offset = random.choice([0, 5]) * random.choice([-1, 1], head_dim)
        return q + offset, 3 * k[random.integers(min(tokens, 3), size=tokens)] + offset
    if "masked" in kind or kind == "minus infinity":  # by one channel, and never the first key
        constant = {"masked": -1e4, "huge masked": -(10.0 ** random.uniform(5, 38.4)), "minus infinity": -math.inf}[kind]
        q[:, -1] = 1
        k[:, -1] = np.where((random.random(tokens) < 0.5) & (np.arange(tokens) > 0), constant, 0)
        return q, k
    size, level = 10 ** random.uniform(1, 4.6), 10 ** random.uniform(0, 4.3)
    found: dict[str, tuple[Matrix, Matrix]] = {
        "normal": (q, k),
        "offset": (q + 5, k + 5),
        "offset keys": (q, k + 5),
        "sigma 5": (q * 5**0.5, k * 5**0.5),
        "huge": (q * size, k * size),  # scores up to 1e9 and more
        "huge offset": (q + level, k + level),
        "tiny": (q / size, k / size),
        "nearly equal": (q, k[:1] + k * 1e-3),
        "zero": (0 * q, k),
        "sparse": (5 * q * (random.random(q.shape) < 0.1), 5 * k * (random.random(k.shape) < 0.1)),
        "signs": (np.sign(q), 1.1 * np.sign(k)),
    }
    return found[kind]


def _values(kind: str, k: Matrix, random: Generator) -> Matrix:
    normal, token = random.standard_normal(k.shape), np.arange(len(k))[:, None]
    found: dict[str, Matrix] = {
        "normal": normal,
        "mean": normal + random.choice([1, 10, 1000]),
        "constant": np.full(k.shape, random.standard_normal()),
        "halves": np.where(token < len(k) / 2, 1, -1) * (1 + 1e-3 * normal),
        "alternating": np.where(token % 2, 1, -1) * np.full(k.shape, random.standard_normal()),
        "by key": np.full(k.shape, 0.7) * np.sign(k.sum(axis=1, keepdims=True)),
        "tiny": normal * 10.0 ** -random.integers(3, 44),
        "huge": normal * 10.0 ** random.integers(3, 39),
        "zero": 0 * normal,
        "k": k,
        "mixed sizes": normal * 10 ** random.uniform(-4, 4, (len(k), 1)),
    }
    return found[kind]


def in_float32(case: Case) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """out [Nq, Dv] and lse [Nq] of a case, where there is one, by torch's float32 in several ways."""
    q, k, v = (torch.from_numpy(array[0, 0].astype(np.float32)) for array in case.arrays)
    terms = _Terms(case)
    yield "softmax", *_softmax(terms.add((q @ k.T) * case.scale), v, terms.sink)
    yield "divided last", *_divided_last(terms.add((q * case.scale) @ k.T), v, terms.sink)
    yield "powers of two", *_powers_of_two((q * case.scale) @ k.T, v, terms)
    if case.terms or case.key_bias is not None or not q.shape == k.shape == v.shape:
        return
    four = [tensor[None, None] for tensor in (q, k, v)]
    options = {"is_causal": case.causal, "scale": case.scale}
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*four, **options)
    yield "flash", out[0, 0], lse[0, 0]
    with sdpa_kernel(SDPBackend.MATH):
        yield "math", torch.nn.functional.scaled_dot_product_attention(*four, **options)[0, 0], None


class _Terms:
    """The mask of a case, and what its scores gain, in float32."""

    def __init__(self, case: Case) -> None:
        options = {name: value for name, value in case.terms.items() if name == "window_size"}
        queries, keys = case.arrays[0].shape[2], case.arrays[1].shape[2]
        attended, distance = mask_by_definition(1, queries, keys, causal=case.causal, **options)
        self.hidden = torch.from_numpy(~attended[0])
        self.distance = torch.from_numpy(np.abs(distance[0])).float()
        self.softcap: float | None = case.terms.get("softcap")
        (self.slope,) = case.terms.get("alibi_slopes", [None])
        (self.sink,) = case.terms.get("learnable_sink", [-math.inf])
        self.bias = None if case.key_bias is None else torch.from_numpy(case.key_bias[0])

    def add(self, scores: torch.Tensor, unit: float = 1.0) -> torch.Tensor:
        """The scores [Nq, Nk] with all terms, divided by `unit`; -inf where masked."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * (self.softcap / unit)
        elif unit != 1.0:
            scores = scores * (1 / unit)
        if self.slope is not None:
            scores = scores - torch.tensor(self.slope / unit) * self.distance
        if self.bias is not None:
            scores = scores + self.bias * (1 / unit)
        return scores.masked_fill(self.hidden, -math.inf)


def _softmax(scores: torch.Tensor, v: torch.Tensor, sink: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.cat([scores, torch.full_like(scores[:, :1], sink)], 1)
    weights = torch.where(scores.isneginf().all(-1, True), 0.0, torch.softmax(scores, -1))  # of a row without a key
    return weights[:, :-1] @ v, torch.logsumexp(scores, -1)


def _divided_last(
    scores: torch.Tensor, v: torch.Tensor, sink: float, exp: Any = torch.exp, log: Any = torch.log
) -> tuple[torch.Tensor, torch.Tensor]:
    maximum = scores.amax(-1).clamp(min=sink)
    shift = maximum.masked_fill(maximum.isneginf(), 0.0)
    weights = exp(scores - shift[:, None])
    den = weights.sum(-1) + exp(sink - shift)
    return (weights @ v) / den.masked_fill(den == 0, 1.0)[:, None], shift + log(den)


def _powers_of_two(scores: torch.Tensor, v: torch.Tensor, terms: _Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """As GPUs compute exponentials: all terms are multiplied by log2(e), each by itself."""
    unit = math.log(2)
    out, lse = _divided_last(terms.add(scores, unit), v, terms.sink / unit, torch.exp2, torch.log2)
    return out, lse * unit
