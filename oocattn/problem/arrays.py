"""The arrays of a problem, as found: their shapes and dtypes, and how they must fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from oocattn.errors import ProblemError
from oocattn.naming import named, setting
from oocattn.records import Pattern

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # supported dtypes and their size in bytes

MAX_HEAD_DIM = 1024

KEY_BIAS = "key_bias"
"""The name of the array that has a number for each key, where q, k and v have a row for each token."""

ArrayName: TypeAlias = Annotated[str, Pattern(f"q|k|v|{KEY_BIAS}")]
"""The name of an array of a dataset, in records."""


def other_order() -> str:
    """Advice for a shape that may have another order of axes."""
    return f"; if the axes are in another order than [B, H, N, D], name it with {named('layout')}"


def weights_dtype(dtype: str, rounds_weights: bool) -> str:
    """The dtype of softmax weights of inputs of a dtype: float32 is precise, and a kernel may round them to the inputs'."""
    return dtype if rounds_weights else "float32"


@dataclass(frozen=True)
class ArraySpec:
    """Name, shape and dtype of one input array, as found."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def four_dimensional(self) -> tuple[int, int, int, int]:
        """The shape [B, H, N, D], with B = 1 for [H, N, D]; ProblemError for other ranks."""
        if len(self.shape) in (3, 4):
            batch, heads, tokens, head_dim = (1, *self.shape)[-4:]
            return batch, heads, tokens, head_dim
        raise ProblemError(
            f"array {self.name!r} has shape {list(self.shape)}: expected [B, H, N, D] or [H, N, D]; "
            f"reshape it, or import it with {named('layout')}"
        )


def check_arrays(q: ArraySpec, k: ArraySpec, v: ArraySpec) -> None:
    """Raise ProblemError unless these are the arrays of a problem, but for the query heads of a K/V head."""
    for spec in (q, k, v):
        if spec.dtype not in DTYPES:
            raise ProblemError(
                f"array {spec.name!r} has dtype {spec.dtype}: expected one of {', '.join(DTYPES)}; convert it first"
            )
    _check_shapes(q, k, v)
    for spec in (k, v):
        if spec.dtype != q.dtype:
            raise ProblemError(
                f"array {spec.name!r} has dtype {spec.dtype}: expected {q.dtype}, the dtype of q: all three have one dtype; "
                f"convert one of them, or import the tensors with {named('dtype')}"
            )


def heads_of_bias(bias: ArraySpec, batch: int, query_heads: int, keys: int) -> int:
    """The heads of a key bias [B, H, N], [H, N] or [N], whose H and B may be 1; ProblemError where it does not fit."""
    shape = (1, 1, *bias.shape)[-3:]
    fits = len(bias.shape) in (1, 2, 3) and shape[0] in (1, batch) and shape[1] in (1, query_heads) and shape[2] == keys
    if bias.dtype != "float32" or not fits:
        raise ProblemError(
            f"array {bias.name!r} is {bias.dtype} {list(bias.shape)}: expected float32 [{_or_one(batch)}, "
            f"{_or_one(query_heads)}, {keys}], a bias for each key, of which the first axes may be left out; write it "
            f"again, or leave it out with {setting('key_bias', False)}"
        )
    return shape[1]


def _or_one(count: int) -> str:
    return "1" if count == 1 else f"1 or {count}"


def _check_shapes(q: ArraySpec, k: ArraySpec, v: ArraySpec) -> None:
    """Check the shapes against each other, but for the query heads of a K/V head."""
    for spec in (q, k, v):
        if 0 in spec.four_dimensional:
            raise ProblemError(
                f"array {spec.name!r} is empty: every dimension must be at least 1, found {list(spec.shape)}; write it again"
            )
    shapes = ", ".join(f"{name} {list(spec.shape)}" for name, spec in (("q", q), ("k", k), ("v", v)))
    (batch, _, _, head_dim), (_, kv_heads, keys, _) = q.four_dimensional, k.four_dimensional
    expected = {"k": [batch, kv_heads, keys, head_dim], "v": [batch, kv_heads, keys, v.four_dimensional[3]]}
    names = {"k": "the batch size and head dimension of q", "v": "the batch size of q, and the heads and tokens of k"}
    for name, spec in (("k", k), ("v", v)):
        if list(spec.four_dimensional) != expected[name]:
            fitting = expected[name][-len(spec.shape) :] if batch == 1 else expected[name]
            raise ProblemError(
                f"array {spec.name!r} has shape {list(spec.shape)}: expected {fitting}, with {names[name]} ({shapes}); "
                f"write the one that is wrong again{other_order()}"
            )
