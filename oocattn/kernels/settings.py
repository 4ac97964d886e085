"""Keep the caller's settings of torch from the results of kernels.

Settings of a thread (default device, autocast, function modes, denormals) do not reach threads of our own
(oocattn/plain_threads.py).
Those of the process (bits of float32 products, errors of nondeterministic operations) are put aside while a kernel works
(`full_precision`). The default dtype is a matter of naming a dtype wherever a tensor is made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LAUNCHING = threading.Lock()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Have float32 products be float32, not TF32 or bfloat16, while a kernel computes; on a GPU, while it launches."""
    if device.type != "cuda":
        with _CPU:
            yield
        return
    with _LAUNCHING, _no_tf32(), _no_refusals():
        yield


class _CpuPrecision:
    """CPUs compute float32 products in float32, in all threads, from the first to enter to the last to leave.

    The setting has two names: the newer is for CPUs alone, torch 2.8 lacks it, and where both are used the older cannot be
    read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._before, self._lowered = "", False

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._before = _get_cpu_precision()
                self._lowered = self._before in ("bf16", "tf32", "medium", "high")
                if self._lowered:
                    _set_cpu_precision("ieee")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within and self._lowered and _get_cpu_precision() in ("ieee", "highest"):  # else the caller set it
                _set_cpu_precision("none")  # which inherits it
                if self._before != _get_cpu_precision():
                    _set_cpu_precision(self._before)


_CPU = _CpuPrecision()


def _get_cpu_precision() -> str:
    newer = getattr(torch.backends.mkldnn, "matmul", None)
    return torch.get_float32_matmul_precision() if newer is None else str(newer.fp32_precision)


def _set_cpu_precision(precision: str) -> None:
    newer = getattr(torch.backends.mkldnn, "matmul", None)
    if newer is not None:
        newer.fp32_precision = precision
    else:
        torch.set_float32_matmul_precision("highest" if precision in ("ieee", "none") else precision)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """No TF32 on GPUs. Of two names the older, torch 2.8's, cannot be read where they disagree, but sets both."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    if precision != "tf32":
        yield
        return
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = True


@contextmanager
def _no_refusals() -> Iterator[None]:
    """No cumulative sum or cuBLAS product raises for not being deterministic: ours sum zeros, NaN and Inf, on one stream."""
    asked = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(asked)
