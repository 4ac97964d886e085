"""Random compositions of everything that may be asked of an attention, each made from its seed, and their right answers.

A case is a problem (shapes, mask, terms of the score, the rows and heads asked for), with everything that may not change its
answer: division, budgets, storage, place of the partials, kernel.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import Array64, attention_by_definition, mask_by_definition
from support import Arrays, numpy_type
from zarr.codecs import BloscCodec, ZstdCodec

DTYPES = ("float16", "bfloat16", "float32")

LONGEST = 160
"""Queries and keys of most cases, at most."""

MASK_ARGUMENTS = {"causal", "window_size", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "prefix", "sink_tokens"}

STORAGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "zstd": {"compressors": ZstdCodec(level=1)},
    "blosc": {"compressors": BloscCodec(clevel=1, typesize=2)},
    "sharded": {"shard_chunks": 2},
}
"""Ways to store the arrays."""


@dataclass(frozen=True)
class Case:
    """One problem and one way to compute it. `asked` are the arguments of the problem as a caller gives them."""

    seed: int
    longest: int
    batch: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str
    asked: Mapping[str, Any]
    bias_heads: int  # of the dataset's key_bias; 0: there is none
    removed: float  # share of the keys whose bias is -inf
    poisoned: tuple[int, ...]  # keys with a value of NaN
    poison_dead: bool  # all that no pair needs is NaN
    chunks: int | None
    decomposition: str
    partials: str | None
    tiles: tuple[int, int]  # on a GPU
    tight: bool  # the smallest budget that works
    kernel: str
    threads: int
    chunk_rows: tuple[int, int]  # of q, and of k and v, as they are stored
    storage: str
    squeezed: bool  # arrays [H, N, D]

    def __str__(self) -> str:
        shown = (f"{field.name}={_plain(getattr(self, field.name))!r}" for field in fields(self)[2:])
        return f"seed {self.seed}: {', '.join(shown)}"

    @property
    def heads(self) -> list[int]:
        """The query heads that are asked for."""
        return list(self.asked.get("heads") or range(self.query_heads))

    @property
    def uses_bias(self) -> bool:
        """Whether the dataset's key_bias counts."""
        return self.bias_heads > 0 and self.asked.get("key_bias", True)

    @property
    def mask(self) -> dict[str, Any]:
        """The arguments that say which keys a row attends."""
        return {name: value for name, value in self.asked.items() if name in MASK_ARGUMENTS}

    @property
    def rows(self) -> range:
        """The rows that are asked for."""
        return range(*self.asked.get("queries", (0, self.queries)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def make_case(seed: int, longest: int = LONGEST) -> Case:
    """The case of that seed, of at most about `longest` queries and keys."""
    chance = random.Random(seed)
    batch, kv_heads = chance.choice([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
    group_size = chance.choice([1, 1, 2, 3, 4])
    queries = _length(chance, longest)
    keys = queries if chance.random() < 0.5 else _length(chance, longest)
    head_dim = chance.choice([1, 2, 3, 8, 16, 31, 64, chance.randint(1, 128)])
    value_dim = head_dim if chance.random() < 0.5 else chance.choice([1, 2, 5, 8, 16, 33, 64])
    if max(queries, keys) < 40 and chance.random() < 0.1:
        head_dim, value_dim = chance.choice([(1024, 3), (3, 1024), (257, 512)])
    heads = kv_heads * group_size
    dtype = chance.choice(DTYPES)
    asked = dict(_asked(chance, batch, heads, queries, keys))
    bias_heads = chance.choice([0, 0, 0, 1, heads])
    if bias_heads and chance.random() < 0.1:
        asked["key_bias"] = False
    decomposition = chance.choice(["cqs", "cqs", "strips", "auto"])
    start, stop = asked.get("queries", (0, queries))
    most = max(stop - start, keys)
    chunks = min(chance.choice([1, 2, 3, 3, 4, 5, 7, 7, 8, 13, 21, 31]), most)
    if batch * kv_heads > 1:
        chunks = min(chunks, 5)
    return Case(
        seed=seed,
        longest=longest,
        batch=batch,
        query_heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        asked=asked,
        bias_heads=bias_heads,
        removed=chance.choice([0.0, 0.0, 0.3, 0.9]),
        poisoned=(chance.randrange(keys),) if chance.random() < 0.15 else (),
        poison_dead=chance.random() < 0.5,
        chunks=None if chance.random() < 0.1 else chunks,
        decomposition=decomposition,
        partials=chance.choice(["memory", "disk"]) if decomposition == "cqs" else None,
        tiles=(chance.randint(1, 40), chance.randint(1, 40)),
        tight=chance.random() < 0.3,
        kernel=chance.choice(["cpu", "cpu", "reference"]),
        threads=chance.choice([1, 1, 2]),
        chunk_rows=(chance.randint(max(1, queries // 6), queries), chance.randint(max(1, keys // 6), keys)),
        storage=chance.choice(["plain", "plain", "plain", "plain", *STORAGE]),
        squeezed=batch == 1 and chance.random() < 0.3,
    )


def _length(chance: random.Random, longest: int) -> int:
    most = 4 * longest if chance.random() < 0.05 else longest
    if longest > 1000:
        return chance.choice([chance.randint(1, 60), chance.randint(longest // 4, most)])
    return chance.choice(
        [1, 2, chance.randint(1, 12), chance.randint(1, 60), chance.randint(1, 60), chance.randint(1, most)]
    )


def _asked(chance: random.Random, batch: int, heads: int, queries: int, keys: int) -> Iterator[tuple[str, Any]]:
    """A random composition of the arguments that have a meaning together."""

    def some(share: float) -> bool:
        return chance.random() < share

    causal = some(0.5)
    longest = max(queries, keys)
    sides = [None, 0, chance.randint(0, 4), chance.randint(0, longest), chance.randint(0, longest + 5)]
    window = (chance.choice(sides), chance.choice(sides)) if some(0.5) else (None, None)
    bounded = window[0] is not None or (window[1] is not None and not causal)
    if causal:
        yield "causal", True
    if window != (None, None):
        yield "window_size", window
    if bounded and some(0.4):
        yield "sink_tokens", chance.randint(1, chance.choice([2, 8, keys + 3]))
    if (bounded or causal) and some(0.25):
        yield "prefix", chance.randint(1, chance.choice([2, 8, keys + 3]))
    if some(0.4):
        count = chance.choice([1, 2, 3, 5, 9, 20])
        yield "cu_seqlens_q", _boundaries(chance, queries, count)
        if queries != keys or some(0.4):
            yield "cu_seqlens_k", _boundaries(chance, keys, count)
    elif some(0.2):
        yield "seqused_k", [chance.choice([0, keys, chance.randint(0, keys)]) for _ in range(batch)]
    if some(0.2):
        yield "softcap", chance.choice([0.5, 2.0, 30.0])
    if some(0.25):
        slopes = [chance.uniform(-0.2, 1.0) * 8 / longest for _ in range(heads * batch)]
        yield "alibi_slopes", slopes[:heads] if some(0.5) else np.reshape(slopes, (batch, heads)).tolist()
    if some(0.25):
        yield "learnable_sink", [chance.choice([-20.0, 0.0, chance.gauss(0, 2), 5.0]) for _ in range(heads)]
    if some(0.3):
        start = chance.randrange(queries)
        yield "queries", (start, chance.randint(start + 1, queries))
    if some(0.25):
        yield "heads", tuple(sorted(chance.sample(range(heads), chance.randint(1, heads))))
    if some(0.3):
        yield "scale", chance.choice([0.05, 0.3])
    if some(0.3):
        yield "out_dtype", chance.choice(DTYPES)


def _boundaries(chance: random.Random, end: int, documents: int) -> list[int]:
    """Boundaries of documents, of which some are empty."""
    inner = [chance.choice([0, end, *(chance.randint(0, end) for _ in range(6))]) for _ in range(documents - 1)]
    return [0, *sorted(inner), end]


@dataclass(frozen=True)
class World:
    """The arrays of a case, and what it must give."""

    arrays: Arrays
    bias: NDArray[np.float32] | None
    attended: NDArray[np.bool_]  # [B, rows asked for, Nk]
    out: Array64
    lse: Array64

    @classmethod
    def of(cls, case: Case) -> World:
        """Draw the arrays from the seed, and compute the answer from the definition."""
        chance = np.random.default_rng(case.seed)

        def normal(heads: int, rows: int, dim: int) -> NDArray[Any]:
            return chance.standard_normal((case.batch, heads, rows, dim), np.float32).astype(numpy_type(case.dtype))

        q = normal(case.query_heads, case.queries, case.head_dim)
        k, v = normal(case.kv_heads, case.keys, case.head_dim), normal(case.kv_heads, case.keys, case.value_dim)
        bias = chance.standard_normal((case.batch, case.bias_heads, case.keys), np.float32) if case.bias_heads else None
        if bias is not None:
            bias[chance.random(bias.shape) < case.removed] = -np.inf
        attended, _ = mask_by_definition(case.batch, case.queries, case.keys, **case.mask)
        attended = attended[:, case.rows]
        if case.poison_dead:
            q[:, :, [row for row in range(case.queries) if row not in case.rows]] = np.nan
            q[:, [head for head in range(case.query_heads) if head not in case.heads]] = np.nan
            for entry, live in enumerate(attended.any(axis=1)):
                k[entry, :, ~live] = v[entry, :, ~live] = np.nan
        v[:, :, list(case.poisoned)] = np.nan
        asked = {name: value for name, value in case.asked.items() if name not in ("out_dtype", "key_bias")}
        used = bias if case.uses_bias else None
        return cls((q, k, v), bias, attended, *attention_by_definition(q, k, v, **asked, key_bias=used))
