"""How many elements are NaN or Inf: of inputs as they are read, and of `out` as it is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def count_not_finite(array: npt.NDArray[Any]) -> int:
    """How many elements are NaN or Inf: those whose exponent bits are all ones.

    Usually none: as integers, these are the largest without a sign and the largest with one, so two maxima tell.
    """
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[array.dtype.name]
    unsigned, signed = (np.uint16, np.int16) if array.itemsize == 2 else (np.uint32, np.int32)
    bits: npt.NDArray[Any] = array.reshape(-1).view(unsigned)
    with_sign: npt.NDArray[Any] = bits.view(signed)
    sign = 1 << (8 * array.itemsize - 1)
    if not len(bits) or (int(np.max(bits)) < sign + exponent and int(np.max(with_sign)) < exponent):
        return 0
    mask = bits.dtype.type(exponent)  # in blocks, so that temporaries stay small
    return sum(int(np.count_nonzero((part & mask) == mask)) for part in np.split(bits, range(1 << 16, len(bits), 1 << 16)))
