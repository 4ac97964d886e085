"""Numbers that are packed or masked by the CF conventions: in attributes beside them, as xarray writes and decodes them.

Such numbers are refused, unless the attributes change none: xarray writes a `_FillValue` of NaN with every array of floats.
`_Unsigned` is about integers, which are refused anyway; xarray does not apply `valid_min`, `valid_max` and `valid_range`.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from oocattn.text import printable

PACKING: Mapping[str, Callable[[float], bool]] = {
    "scale_factor": lambda number: number == 1,
    "add_offset": lambda number: number == 0,
    "_FillValue": math.isnan,  # NaN is masked with NaN
    "missing_value": math.isnan,
}
"""The attributes that xarray decodes, and where the decoded numbers are those that are stored."""


def packing_attribute(attributes: Mapping[Any, Any]) -> str | None:
    """The attribute, with its value, by which numbers are packed or masked; None where there is none."""
    for name, unchanged in PACKING.items():
        found = attributes.get(name)
        for item in found if isinstance(found, list | tuple | np.ndarray) else [found]:
            number = _number(item)
            if item is not None and (number is None or not unchanged(number)):
                return f"the attribute {name} = {printable(repr(item if number is None else number)):.80}"
    return None


def _number(found: object) -> float | None:
    """The number that an attribute holds, or None. It may be a text, or base64 as which xarray writes a `_FillValue`."""
    if isinstance(found, np.generic | np.ndarray) and found.size == 1:
        found = found.item()
    if not isinstance(found, int | float | str):
        return None
    with suppress(ValueError, OverflowError):
        return float(found)
    with suppress(ValueError, TypeError, struct.error):
        return float(*struct.unpack("<d", base64.b64decode(str(found), validate=True)))
    return None
