"""What the axes and the numbers of an array mean, by its names and attributes.

An array whose axes are in another order than [B, H, N, D] has a shape like any other: `[B, N, H, D]` is read as N heads
of H tokens. Names are believed where each one that is given is known and together they can be read in one way only.

xarray packs or masks arrays by the CF conventions, in attributes that Zarr does not look at. Such an array is refused.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from oocattn.cf_packing import PACKING, packing_attribute
from oocattn.errors import ProblemError
from oocattn.naming import by_face
from oocattn.problem.arrays import KEY_BIAS, ArraySpec
from oocattn.storage.inputs.axes import LAYOUTS, PACKED_LAYOUTS

if TYPE_CHECKING:
    import zarr

logger = logging.getLogger("oocattn")

DimensionNames: TypeAlias = "list[Any] | tuple[Any, ...]"
"""What the dimensions of an array are called, in order, from outside: anything, of which texts may be believed."""

_OTHER = {"bhnd": "bnhd", "bnhd": "bhnd", "hnd": "nhd", "nhd": "hnd"}  # the layout that another one is taken for
_OF = r"(q|k|v|kv|query|key|value|keyvalue|source|src|target|tgt|context|attention|attn)?"
_INDEX = r"(s|ids?|idx|index|size|count|axis|dim|pos|position)?"
_WORDS = {
    "b": rf"[bn]|bs|bsz|(num|n)?batch(es)?{_INDEX}|samples?|examples?",
    "h": rf"[hn]|nh|h(q|k|v|kv)|(q|k|v|kv)h|(num|n)?{_OF}(heads?(ids?|idx|index|count|axis)?|groups?){_OF}",
    "n": (
        rf"[nstlmqk]|[nstl](q|k|v|kv)|queries|(num|n|max)?{_OF}(tokens?|seq|sequences?|positions?|pos|time|timesteps?|steps?|"
        rf"lengths?|len|seqlen|seqlength|sequencelength|contexts?|contextlength|ctx|patch|patches|words?|frames?|query|key)"
        rf"{_INDEX}{_OF}"
    ),
    "d": (
        rf"[dhkecf]|d(h|k|v|q|qk|model)|hd|(qk)?{_OF}(head)?(dims?|dimensions?|depth|channels?|features?|embed|embedding|"
        rf"embeddingdim|embeddim|hidden|hiddendim|hiddensize)(qk)?{_OF}|head(size|width)|dimhead|dhead|dimperhead|"
        rf"sizeperhead|components?"
    ),
}
"""What the axes are called, in small letters and digits alone. Of some single letters the others decide: BTNH and BHND."""

_WORDS["f"] = rf"{_WORDS['d']}|[hn]d|hdim"
_WORDS["3"] = r"3|three|(q|k|v){3}|(kinds?|parts?|components?|channels?|projections?|stack|tensors?|which)"

_KNOWN = {axis: re.compile(words) for axis, words in _WORDS.items()}

_MOST_LETTERS = 40  # of a name that is known

_NAMED_DIMENSIONS = "_ARRAY_DIMENSIONS"  # what xarray adds to an array of Zarr v2
MEANINGFUL = (*PACKING, _NAMED_DIMENSIONS)
"""The attributes of an array that say what its numbers and its axes are."""


def dimension_names(array: zarr.Array[Any]) -> list[DimensionNames]:
    """The names of an array's dimensions: `dimension_names` of Zarr v3, and xarray's `_ARRAY_DIMENSIONS` of v2."""
    named = (getattr(array.metadata, "dimension_names", None), array.attrs.get(_NAMED_DIMENSIONS))
    return [names for names in named if isinstance(names, list | tuple) and len(names) == array.ndim]


def believed_order(name: str, names: DimensionNames) -> str | None:
    """The only order of axes that dimension names allow: of "q", "k" or "v", of "qkv", or of "key_bias"."""
    if name == "qkv":
        return _order(names, "bn3hd" if len(names) > 3 else "bnf")
    if name == KEY_BIAS:
        return _order(names, "bhn") or _order(names, "bn")  # all heads may share it
    return _order(names, "bhnd")


def order_by_names(name: str, label: str, named: Sequence[DimensionNames]) -> str | None:
    """The order of the axes, such as "bnhd", that dimension names give: of "q", "k" or "v", of "qkv", or of "key_bias".

    None where no names are believed. Raises ProblemError, which calls the tensor `label`, for an order that is not read in
    place, and for two.
    """
    told = {order: names for names in named if (order := believed_order(name, names))}
    layouts = PACKED_LAYOUTS if name == "qkv" else LAYOUTS
    wrong = [order for order in told if not (name == KEY_BIAS or order in layouts)]
    if not wrong and len(told) < 2:
        return next(iter(told), None)
    words = " and ".join(f"{_letters(order)} ({', '.join(map(str, names))})" for order, names in told.items())
    meant = "batch, tokens, q k v, heads, dimension; features" if name == "qkv" else "batch, heads, tokens, dimension"
    expected = "[B, H, N], [H, N] or [B, N]" if name == KEY_BIAS else f"one of {', '.join(layouts)} ({meant})"
    raise ProblemError(
        f"the dimension names of {label} say that it is {words}: expected {expected}; write it transposed, or correct the "
        "names if they are wrong"
    )


def warn_if_transposed(q: ArraySpec, k: ArraySpec, orders: Sequence[str] | None = None) -> None:
    """Warn where q and k, whose axes are in these orders (default: [B, H, N, D]), have more heads than tokens.

    In a decode step q alone has.
    """
    orders = orders or ["bhnd"[4 - len(spec.shape) :] for spec in (q, k)]
    size, of_keys = (dict(zip(order, spec.shape, strict=True)) for order, spec in zip(orders, (q, k), strict=True))
    if size["h"] <= size["n"] or of_keys["h"] <= of_keys["n"]:
        return
    taken, other = orders[0], _OTHER[orders[0]]
    logger.warning(
        "%s",
        f"{q.name} {list(q.shape)} is taken for {_letters(taken)}, {size['h']:,} heads x {size['n']:,} tokens: more heads "
        f"than tokens; if it is {_letters(other)}, the result is wrong: name the tensors one by one, with their layout "
        f"({by_face(f'oocattn.Inputs(q=..., k=..., v=..., layout={other!r})', f'--q --k --v --layout {other}')})",
    )


def _letters(order: str) -> str:
    return f"[{', '.join(order.upper())}]"


def _order(names: DimensionNames, axes: str) -> str | None:
    """The only order of axes, like "bhnd", that the names allow, or None. An axis without a name, None, may be any."""
    if len(names) not in (len(axes) - 1, len(axes)) or not all(name is None or isinstance(name, str) for name in names):
        return None
    called = [_axes_called(name) for name in names]
    found = [order for order in itertools.permutations(axes[-len(names) :]) if all(map(set.__contains__, called, order))]
    return "".join(found[0]) if len(found) == 1 else None


def _axes_called(name: str | None) -> set[str]:
    """The axes that may be called so. Those of packed tensors have no usual name: any that is not known may be theirs."""
    if name is None:
        return {*_KNOWN}
    plain = re.sub("[^a-z0-9]", "", name[: 2 * _MOST_LETTERS].lower())
    found = {axis for axis, words in _KNOWN.items() if len(plain) <= _MOST_LETTERS and words.fullmatch(plain)}
    return found or {"3", "f"}


def refuse_packed(array: zarr.Array[Any], location: str) -> None:
    """Raise ProblemError where an array is packed, naming the attribute."""
    found = packing_attribute(array.attrs)
    if found is None and (filled := _mask_of_v2(array)) is not None:
        found = f"the fill_value {filled}, as which xarray keeps _FillValue,"
    if found is not None:
        raise ProblemError(
            f"array {array.path!r} of {location} has {found} by which its numbers are packed or masked (CF "
            "conventions): expected plain numbers; write the decoded ones, as with "
            "xarray.open_zarr(PATH).drop_encoding().astype('float32').to_zarr(NEW), and give NEW"
        )


def _mask_of_v2(array: zarr.Array[Any]) -> Any:
    """The fill value by which xarray masks an array of Zarr v2, or None. Zero is what Zarr fills with by itself."""
    filled: Any = array.metadata.fill_value
    if array.metadata.zarr_format != 2 or _NAMED_DIMENSIONS not in array.attrs or filled is None:
        return None
    return None if filled != filled or filled == 0 else filled
