"""Sizes, budgets and bounds of whole runs on a GPU, and their verification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oocattn
from oocattn import Result

TOKENS = 100_003
MIB = 1 << 20
BOUND = {"float16": 4e-4, "bfloat16": 3e-3, "float32": 2e-6}
"""Relative error of the output over all sampled rows; for 16 bits it is rounded up to three times on its way."""
PRECISE_BOUND = {"float16": 2e-6, "bfloat16": 5e-6}
"""The same of precise runs of 16-bit inputs whose output is float32."""

BUDGETS = {"device_memory": "1GiB", "host_memory": "4GiB"}

Datasets = Callable[..., Path]


def assert_verified(result: Result, dtype: str, *, precise: bool = False) -> None:
    certificate = oocattn.verify(result.path, rows=64)
    assert certificate.passed, str(certificate)
    assert certificate.error <= (PRECISE_BOUND if precise else BOUND)[dtype], str(certificate)
