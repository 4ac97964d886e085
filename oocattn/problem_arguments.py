"""The arguments that pose a problem over a dataset: those that `plan` and `attention` share, and the command line.

Names and meaning are FlashAttention's where it has the argument. To add one: an item of `ProblemArguments`, and its default
and its check in `PROBLEM_OPTIONS`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

import numpy as np

from oocattn.arguments import Dtype, Option, boolean, dtype, integer, number, refused, scale
from oocattn.cf_packing import packing_attribute
from oocattn.errors import ProblemError
from oocattn.filters import no_warnings
from oocattn.problem.given import DTYPES, MOST_ITEMS, Array
from oocattn.problem.options import Window
from oocattn.problem.scores import LEAST_SCALE, MOST_SCALE, SOFTCAPS

if TYPE_CHECKING:
    import torch

Numbers: TypeAlias = "Sequence[float] | np.ndarray[Any, Any] | torch.Tensor | str | Path"
"""Numbers as callers give them: a list, an array of NumPy or PyTorch, an .npy file's path, a dataset's array by name."""

_FORMS = "as a list, an array of NumPy or PyTorch, the path of an .npy file, or the name of an array in the dataset"

MOST_HEADS = 1 << 20  # that are chosen by index

_RANKS = {"alibi_slopes": (1, 2)}
"""The ranks of arrays that may have another than 1."""


class ProblemArguments(TypedDict, total=False):
    """What may be asked of the attention of a dataset.

    In each document, of queries Nq and keys Nk (all of them, where `cu_seqlens_q` is not given), query i is at position
    p = i + Nk - Nq, so that the last query is at the last key. It attends key j

    * `causal`: where j <= p;
    * `window_size=(left, right)`: where p - left <= j <= p + right; None or -1 is no bound, and `causal` makes `right` 0;
    * `cu_seqlens_q`, `cu_seqlens_k` [documents + 1]: boundaries of packed documents, from 0 to the number of queries and of
      keys; a query attends keys of its own document; one array serves for both;
    * `seqused_k` [B]: only so many keys of a batch entry exist;
    * `prefix`: all queries attend the first so many keys of their document;
    * `sink_tokens`: the window does not bound the first so many keys of a document.

    Its score s is `scale` (positive; default 1/sqrt(D)) times q . k, and then

    * `softcap`: softcap * tanh(s / softcap);
    * `alibi_slopes` [Hq] or [B, Hq]: minus slope * abs(p - j);
    * `key_bias`: plus the number that the dataset's array of that name, float32 [1 or B, 1 or Hq, Nk], [1 or Hq, Nk] or
      [Nk], has for the key, where the dataset has one (default: True);
    * `learnable_sink` [Hq]: the softmax's denominator and `lse` have one more score, without a value.

    Of a dataset that `oocattn.integrations.transformers.capture` wrote, `scale`, `softcap`, `causal`, `window_size` and
    `learnable_sink` are those of the model's layer where they are None, unless `recorded` is False (default: True).

    `queries=(start, stop)` and `heads` (query heads, ascending) compute a part of the rows, at the same positions. `dtype`
    is that of `out` (default: that of q): a name ("bfloat16", "bf16") or a dtype of NumPy or PyTorch.
    """

    causal: bool | None
    window_size: Window | Sequence[int | None] | None
    cu_seqlens_q: Numbers | None
    cu_seqlens_k: Numbers | None
    seqused_k: Numbers | None
    prefix: int
    sink_tokens: int
    scale: float | None
    softcap: float | None
    alibi_slopes: Numbers | None
    key_bias: bool
    recorded: bool
    learnable_sink: Numbers | None
    queries: Sequence[int] | None
    heads: Sequence[int] | None
    dtype: Dtype | None


def stated(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not left out: not None, nor a softcap of 0."""
    return {name: value for name, value in asked.items() if value is not None and (name, value) != ("softcap", 0.0)}


def window(name: str, value: object) -> Window:
    """Keys before and after a row's own; None and -1 are no bound."""
    expected = "(left, right), each a whole number of keys, or None or -1 for no bound"
    check = integer(-1)
    sides = _pair(name, value, expected)
    left, right = (None if side is None or check(name, side) == -1 else check(name, side) for side in sides)
    return left, right


def softcap(name: str, value: object) -> float:
    """A positive number; 0, which is FlashAttention's default, is no softcap."""
    found: float = number(0.0, MOST_SCALE, SOFTCAPS)(name, value)
    return cast(float, number(LEAST_SCALE, MOST_SCALE, SOFTCAPS)(name, value)) if found else 0.0


def span(name: str, value: object) -> tuple[int, int]:
    """The first of a range, and one beyond its last."""
    if isinstance(value, range | slice):
        value = (value.start, value.stop) if value.step in (None, 1) else ()
    start, stop = (integer(0)(name, end) for end in _pair(name, value, "(start, stop), two whole numbers"))
    return start, stop


def indices(name: str, value: object) -> tuple[int, ...]:
    """Whole numbers, as a tuple."""
    items = _items(name, value, f"a list of whole numbers, {MOST_HEADS:,} at most", MOST_HEADS)
    return tuple(integer(0)(name, item) for item in items)


def numbers(name: str, value: object) -> Array | str | Path:
    """The numbers of an array argument, of the dtype that it is kept in; a path or name stays as it is."""
    if isinstance(value, str | os.PathLike):
        return value if isinstance(value, str) else Path(os.fsdecode(value))
    if _count(value) > MOST_ITEMS:
        raise refused(name, value, f"at most {MOST_ITEMS:,} numbers")
    try:
        array = _as_array(value)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of an array's own class there may be any
        raise refused(name, value, f"{_expected(name)}, {_FORMS}") from error
    attributes = getattr(value, "attrs", None)  # of arrays of xarray, Zarr and h5py
    if isinstance(attributes, Mapping) and (packing := packing_attribute(attributes)) is not None:
        raise refused(name, value, f"{_expected(name)}, not packed or masked by {packing}; give the decoded ones")
    if np.ma.is_masked(array):
        raise refused(name, value, f"{_expected(name)}, none of them masked; fill those that are")
    return kept_array(name, array, lambda expected: refused(name, value, f"{expected}, {_FORMS}"))


def _as_array(value: object) -> Array:
    """A sequence or an array as one of NumPy's; what is masked stays so. Raises an error of any class for anything else."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return cast(Array, (value.float() if value.is_floating_point() else value).numpy(force=True))
    if "dask" in sys.modules and sys.modules["dask"].is_dask_collection(value):
        return _as_array(value.compute())  # type: ignore[attr-defined] # NumPy would be given it without its mask
    if not isinstance(value, list | tuple) or all(map(_is_number, {*map(type, value)})):
        return np.asanyarray(value)
    items = [_as_array(item) for item in value]
    if len({item.dtype.kind == "b" for item in items}) > 1:
        raise TypeError("NumPy would count True as 1 among numbers")
    return cast(Array, np.ma.stack(items))


def _is_number(kind: type) -> bool:
    """True for a class of numbers; a bool is none."""
    return issubclass(kind, int | float | np.integer | np.floating) and kind is not bool


def kept_array(name: str, array: Array, refuse: Callable[[str], ProblemError]) -> Array:
    """An array as the argument of that name is kept. Raises what `refuse` makes of what was expected."""
    whole = DTYPES[name].kind == "i"
    supported = array.dtype.kind in ("iu" if whole else "iuf") or (array.dtype.name == "bfloat16" and not whole)
    if not supported or not array.size or array.ndim not in _RANKS.get(name, (1,)) or (whole and array.max() >= 2**63):
        raise refuse(_expected(name))
    if array.size > MOST_ITEMS:
        raise refuse(f"at most {MOST_ITEMS:,} numbers")
    with no_warnings(), np.errstate(over="ignore"):  # what float32 does not hold is refused later
        kept = np.array(array, DTYPES[name], order="C")
    kept.flags.writeable = False
    return kept


def _count(value: Any) -> int:
    """The numbers that an array or the items that a sequence says it has; 0 where it does not say."""
    with suppress(Exception):  # of an array's own class there may be any
        return math.prod(value.shape) if hasattr(value, "shape") else len(value)
    return 0


def _expected(name: str) -> str:
    if DTYPES[name].kind == "i":
        return "whole numbers in one dimension, no floats, each below 2^63"
    return "numbers [Hq] or [B, Hq]" if name in _RANKS else "numbers in one dimension"


def _items(name: str, value: object, expected: str, most: int) -> Sequence[Any]:
    """The items of what has them in an order and is no text, so many at most."""
    if not isinstance(value, str | bytes | Mapping | Set):
        with suppress(TypeError, RuntimeError):  # a tensor on the device "meta" has none
            items = list(islice(value, most + 1))  # type: ignore[call-overload]
            if len(items) <= most:
                return items
    raise refused(name, value, expected)


def _pair(name: str, value: object, expected: str) -> Sequence[Any]:
    """The two items of a sequence."""
    items = _items(name, value, expected, 2)
    if len(items) != 2:
        raise refused(name, value, expected)
    return items


PROBLEM_OPTIONS: dict[str, Option] = {
    "causal": Option(None, boolean),
    "window_size": Option(None, window),
    "cu_seqlens_q": Option(None, numbers),
    "cu_seqlens_k": Option(None, numbers),
    "seqused_k": Option(None, numbers),
    "prefix": Option(0, integer(0)),
    "sink_tokens": Option(0, integer(0)),
    "scale": Option(None, scale),
    "softcap": Option(None, softcap),
    "alibi_slopes": Option(None, numbers),
    "key_bias": Option(True, boolean),
    "recorded": Option(True, boolean),
    "learnable_sink": Option(None, numbers),
    "queries": Option(None, span),
    "heads": Option(None, indices),
    "dtype": Option(None, dtype),
}
"""Each argument of `ProblemArguments`: its default and its check."""
