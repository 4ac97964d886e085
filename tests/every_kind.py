"""Random problems of every kind that float32 has trouble with, and ways to compute them that are as good as torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
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
    """One head: q, k and v [1, 1, N, D] and how they are attended."""

    keys: str
    values: str
    arrays: Arrays
    causal: bool
    scale: float

    def __str__(self) -> str:
        q = self.arrays[0]
        return f"{self.keys}, values {self.values}: {q.shape[2:]} {q.dtype}, causal {self.causal}, scale {self.scale}"


def a_case(seed: int, most_tokens: int = 3000) -> Case:
    """The problem of a seed."""
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
    arrays = tuple(array.astype(numpy_type(dtype))[None, None] for array in (q, k, v))
    return Case(keys, values, arrays, bool(random.random() < 0.5), scale)


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
    """out [N, D] and lse [N] of a case, where there is one, by torch's float32 in several ways."""
    q, k, v = (torch.from_numpy(array[0, 0].astype(np.float32)) for array in case.arrays)
    mask = torch.full((len(q), len(q)), -math.inf).triu_(1) if case.causal else torch.zeros(())
    scores = (q @ k.T) * case.scale + mask
    yield "softmax", torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
    scores = (q * case.scale) @ k.T + mask
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    den = weights.sum(-1)
    yield "divided last", (weights @ v) / den[:, None], scores.amax(-1) + torch.log(den)
    four = [tensor[None, None] for tensor in (q, k, v)]
    options = {"is_causal": case.causal, "scale": case.scale}
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*four, **options)
    yield "flash", out[0, 0], lse[0, 0]
    with sdpa_kernel(SDPBackend.MATH):
        yield "math", torch.nn.functional.scaled_dot_product_attention(*four, **options)[0, 0], None
