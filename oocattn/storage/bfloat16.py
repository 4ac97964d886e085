"""bfloat16 as a Zarr data type; importing this module registers it.

Plain `zarr.open_array` then reads and writes such arrays. The name is that of the zarr-extensions registry
(github.com/zarr-developers/zarr-extensions, data-types/bfloat16), the bytes and the fill values are those of TensorStore's
zarr3 driver: two bytes an element in the byte order of the `bytes` codec; the fill value a number, "NaN", "Infinity",
"-Infinity" or the four hexadecimal digits of the bits. Zarr format 2 has no such type.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np

from oocattn.storage.zarr_compat import (
    JSON,
    DataTypeValidationError,
    DTypeJSON,
    HasEndianness,
    HasItemSize,
    ZarrFormat,
    ZDType,
    data_type_registry,
)

_NATIVE: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype called `name` in NumPy; bfloat16 is that of ml_dtypes."""
    return _NATIVE if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType["np.dtype[Any]", "np.generic"], HasEndianness, HasItemSize):
    """The Zarr v3 data type `bfloat16`, in NumPy `ml_dtypes.bfloat16`."""

    dtype_cls = type(_NATIVE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """The Zarr data type of a numpy dtype. Raises DataTypeValidationError if it is not bfloat16."""
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected ml_dtypes.bfloat16")
        swapped = dtype != _NATIVE
        return cls(endianness="big" if swapped == (sys.byteorder == "little") else "little")

    def to_native_dtype(self) -> np.dtype[Any]:
        """The numpy dtype, in this type's byte order."""
        return _NATIVE if self.endianness == sys.byteorder else _NATIVE.newbyteorder("S")

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError("Zarr format 2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"Invalid data type: {data!r}. Expected {cls._zarr_v3_name!r}")
        return cls()

    def to_json(self, zarr_format: ZarrFormat) -> str:  # type: ignore[override]
        """The name in the array's metadata. Raises ValueError for Zarr format 2."""
        if zarr_format == 2:
            raise ValueError("Zarr format 2 has no bfloat16: create the array with zarr_format=3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        try:
            float(data)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
        return True

    def cast_scalar(self, data: object) -> np.generic:
        """`data` as a bfloat16 scalar. Raises TypeError if it is not a number."""
        if not self._check_scalar(data):
            raise TypeError(f"Cannot convert {data!r} to a bfloat16 scalar")
        # text goes through float: ml_dtypes 0.6.0 dies of text that is not a number
        scalar: np.generic = _NATIVE.type(float(data) if isinstance(data, str) else data)
        return scalar

    def default_scalar(self) -> np.generic:
        """Zero."""
        return self.cast_scalar(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> np.generic:
        """A fill value from the array's metadata. Raises TypeError if it is not one."""
        if isinstance(data, str) and data.startswith("0x"):
            return self.cast_scalar(np.array(int(data, 16), dtype=np.uint16).view(_NATIVE)[()])
        if isinstance(data, bool) or not isinstance(data, (int, float, str)):
            raise TypeError(f"Invalid bfloat16 fill value: {data!r}. Expected a number, 'NaN', 'Infinity' or '0x....'")
        return self.cast_scalar(data)

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> float | str:
        """A fill value as metadata hold it; unusual NaNs by their bits."""
        scalar = self.cast_scalar(data)
        number = float(scalar)
        if math.isnan(number):
            bits = int(np.array(scalar, dtype=_NATIVE).view(np.uint16))
            return "NaN" if bits == 0x7FC0 else f"{bits:#06x}"
        if math.isinf(number):
            return "Infinity" if number > 0 else "-Infinity"
        return number


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
