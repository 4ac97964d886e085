"""Keep the caller's settings of torch from the results of kernels.

Some settings belong to a thread: the default device, autocast, function modes, whether small numbers are flushed to zero.
Kernels are called in threads of our own, which have none of them (`plain_threads`). Others belong to the process: in how
many bits float32 products are computed, whether nondeterministic operations raise. They are put aside while a kernel works
(`full_precision`). The default dtype is a matter of naming a dtype wherever a tensor is made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from oocattn.forks import note_computing
from oocattn.threads import ThreadPool, begin_call

_LAUNCHING = threading.Lock()
_COUNTING = threading.Lock()


def plain_threads(count: int, name: str, cores: int | None = None) -> ThreadPool:
    """A pool of threads that compute with none of the caller's settings.

    A thread begins with torch's own defaults, but on Linux it inherits whether the processor flushes to zero what is
    smaller than the smallest normal number, and so do the threads of OpenMP that it makes. In each thread torch uses
    `cores` (None: as many as the process does).
    """
    note_computing()
    return ThreadPool(count, name, partial(_begin_plainly, cores))


def _begin_plainly(cores: int | None) -> None:
    torch.set_flush_denormal(False)
    if cores is not None:
        _use_cores(cores)


def _use_cores(count: int) -> None:
    """Have torch use so many cores in this thread; later threads are unchanged.

    To set the number is to set it for both. So another thread puts it back at once: the calling thread keeps its own.
    """
    with _COUNTING:
        usual = torch.get_num_threads()
        if usual == count:
            return
        torch.set_num_threads(count)
        begin_call(torch.set_num_threads, usual).result()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Have float32 matrix products within be float32: not TF32, not bfloat16.

    The permission is a global one: it is taken away for as long as a kernel computes, on a GPU only launches, and then given
    back. Other products of the process meanwhile are more exact than asked.
    """
    if device.type != "cuda":
        with _CPU:
            yield
        return
    with _LAUNCHING, _no_tf32(), _no_refusals():
        yield


class _CpuPrecision:
    """Context manager: CPUs compute float32 products in float32, in all threads.

    The first one to enter takes the permission away, and the last one to leave gives it back. It has two names: the newer is
    one for CPUs alone, which torch 2.8 lacks, and where both are used the older cannot be read.
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
    """Context manager: no TF32 on GPUs.

    The setting has two names: the older, the only one that torch 2.8 has, cannot be read where they disagree, but
    sets both.
    """
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
    """Context manager: no operation raises on GPUs for not being deterministic.

    Such are cumulative sums, and products without a setting of cuBLAS. None of ours depends on it: sums of floats are
    over zeros, NaN and Inf, and products are launched on one stream.
    """
    asked = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(asked)
