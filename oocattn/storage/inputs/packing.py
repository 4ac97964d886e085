"""Refusal of arrays that are packed or masked by the CF conventions.

xarray writes such arrays. Their attributes say what a reader must make of the numbers, and Zarr does not look at them. Here
such an array is refused: what is stored in it is not what its owner means. Attributes that change no number are let pass,
for xarray writes a `_FillValue` of NaN with every array of floats.

`_Unsigned` is about integers alone, which are refused as such. `valid_min`, `valid_max` and `valid_range` are not looked at:
xarray does not apply them.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import zarr

from oocattn.errors import ProblemError
from oocattn.text import printable

_CHANGES_NOTHING: Mapping[str, Callable[[float], bool]] = {
    "scale_factor": lambda number: number == 1,
    "add_offset": lambda number: number == 0,
    "_FillValue": math.isnan,  # NaN is masked with NaN
    "missing_value": math.isnan,
}
"""The attributes that xarray decodes, and where the decoded numbers are those that are stored."""

_NAMED_DIMENSIONS = "_ARRAY_DIMENSIONS"
"""What xarray adds to an array of Zarr v2."""

MEANINGFUL = (*_CHANGES_NOTHING, _NAMED_DIMENSIONS)
"""The attributes of an array that say what its numbers and its axes are."""


def refuse_packed(array: zarr.Array[Any], location: str) -> None:
    """Raise ProblemError where an array is packed, naming the attribute."""
    for name, unchanged in _CHANGES_NOTHING.items():
        found = array.attrs.get(name)
        for item in found if isinstance(found, list) else [found]:
            number = _number(item)
            if item is not None and (number is None or not unchanged(number)):
                shown = printable(repr(item if number is None else number))
                raise _packed_error(array, location, f"the attribute {name} = {shown:.80}")
    if (filled := _mask_of_v2(array)) is not None:
        raise _packed_error(array, location, f"the fill_value {filled}, as which xarray keeps _FillValue,")


def _packed_error(array: zarr.Array[Any], location: str, found: str) -> ProblemError:
    return ProblemError(
        f"array {array.path!r} of {printable(location)} has {found} by which its numbers are packed or masked (CF "
        "conventions): expected plain numbers; write the decoded ones, as with "
        "xarray.open_zarr(PATH).drop_encoding().astype('float32').to_zarr(NEW), and give NEW"
    )


def _number(found: object) -> float | None:
    """The number that an attribute holds; None where that is not understood.

    A text is one such as "NaN", or a double in base64, as which xarray writes a `_FillValue` in Zarr v3.
    """
    if not isinstance(found, int | float | str):
        return None
    with suppress(ValueError, OverflowError):
        return float(found)
    with suppress(ValueError, TypeError, struct.error):
        return float(*struct.unpack("<d", base64.b64decode(str(found), validate=True)))
    return None


def _mask_of_v2(array: zarr.Array[Any]) -> Any:
    """The fill value by which xarray masks an array of Zarr v2, or None.

    Zero is what Zarr itself fills with where nobody has chosen.
    """
    filled: Any = array.metadata.fill_value
    if array.metadata.zarr_format != 2 or _NAMED_DIMENSIONS not in array.attrs or filled is None:
        return None
    return None if filled != filled or filled == 0 else filled
