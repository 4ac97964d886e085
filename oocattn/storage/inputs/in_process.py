"""Sources of tensors whose numbers only this process has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.kept import keep, recall
from oocattn.storage.inputs.origin import Origin
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.inputs.values import checksum


class InProcessSource(TensorSource):
    """A tensor of a caller's, `content`, of some `kind`. It is told by its numbers; another process cannot read it."""

    def __init__(self, name: str, content: Any, kind: str, shape: Sequence[int], dtype: str, axes: Axes) -> None:
        super().__init__(name, Origin(kind, "", "", axes), tuple(map(int, shape)), dtype)
        self._content = content
        self._token = keep(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return recall, (self._token, self.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `TensorSource.dtype`."""
        return numpy_dtype(self.spec.dtype)

    def check_complete(self) -> None:
        """What a caller holds is there."""

    def fingerprints(self) -> tuple[str, str, str]:
        """A checksum of the numbers, as they were when first asked for."""
        return self._checksum, self._checksum, self._checksum

    @cached_property
    def _checksum(self) -> str:
        return checksum(self)
