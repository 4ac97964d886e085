"""Memory that is allocated once and handed out in pieces, and host memory that is pinned for a GPU.

Pinning with CUDA's own allocator faults pages in one by one: 2.5 GB/s measured (H200 host). Huge pages, touched by
several threads and then registered, take a sixth of that: 15 GB/s.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Generic, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from oocattn.errors import BudgetError
from oocattn.kernels import AttentionState
from oocattn.planning.memory import ALIGNMENT
from oocattn.units import format_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process
_TOUCHING_THREADS = 8


T = TypeVar("T")


class Pool(Generic[T]):
    """Pieces of memory of one kind, uninitialised, to be taken and put back; some may yet be allocated."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free: deque[T] = deque()
        self._error: BaseException | None = None

    def put(self, piece: T) -> None:
        """Let a piece be taken, by whoever waits for one."""
        with self._changed:
            self._free.append(piece)
            self._changed.notify()

    def take(self) -> T:
        """A free piece, waiting for one if need be. Raises what `fail` was told if none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._error)
            if not self._free and self._error is not None:
                raise self._error
            return self._free.popleft()

    def fail(self, error: BaseException) -> None:
        """No more pieces will be allocated."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


@cache
def pinning(device: torch.device) -> ThreadPoolExecutor:
    """The one thread of this process that pins host memory for a GPU, and unpins it, for good.

    One after the other: what a lane has given up is gone before the next one gets any.
    """
    return ThreadPoolExecutor(1, thread_name_prefix=f"oocattn-pin-{device}")


class Arena:
    """Hands out the bytes of one allocation, from its beginning to its end, aligned to 256 bytes."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in the next bytes. Raises BudgetError where none are left: the plan was wrong."""
        count = math.prod(shape) * dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + count > len(self._memory):
            raise BudgetError(
                f"the lane needs {format_bytes(start + count)} where {format_bytes(len(self._memory))} were planned"
            )
        self._used = start + count
        return self._memory[start : start + count].view(dtype).view(tuple(shape))

    def state(self, group_size: int, rows: int, head_dim: int) -> AttentionState:
        """An uninitialised state of [group_size, rows, head_dim]."""
        return AttentionState(
            num=self.take((group_size, rows, head_dim), torch.float32),
            den=self.take((group_size, rows), torch.float32),
            max=self.take((group_size, rows), torch.float32),
            keys=self.take((rows,), torch.int64),
            key_sum=self.take((rows,), torch.int64),
        )


class PinnedMemory:
    """Page-locked host memory of `nbytes` for the current GPU, as the uint8 tensor `tensor`, until `close`.

    Raises BudgetError where the system refuses to lock so much.
    """

    def __init__(self, nbytes: int) -> None:
        try:
            region = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as refused:
            raise BudgetError(
                f"{format_bytes(nbytes)} of host memory cannot be had ({refused.strerror}): lower --host-memory, or raise "
                "the limit on address space (ulimit -v)"
            ) from refused
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        content = np.frombuffer(region, np.uint8)
        _touch(content)
        error = torch.cuda.cudart().cudaHostRegister(content.ctypes.data, len(content), _PORTABLE)
        if error != torch.cuda.cudart().cudaError.success:
            raise BudgetError(
                f"{format_bytes(nbytes)} of host memory cannot be pinned ({error}): lower --host-memory, or raise the limit "
                "on locked memory"
            )
        self.tensor = torch.from_numpy(content)
        self.close = weakref.finalize(self, _unregister, content, torch.cuda.current_device())


def close_all(memories: Iterable[PinnedMemory]) -> None:
    """Give pinned memory back; its tensors must not be used any more."""
    for memory in memories:
        memory.close()


def _unregister(content: np.ndarray[tuple[int], np.dtype[np.uint8]], index: int) -> None:
    """Unlock the pages; they are given back when the last view of them is gone, which this argument is until then.

    GPU `index` is the one they were locked for: without it, CUDA would set up the first one just for this.
    """
    with torch.cuda.device(index):
        torch.cuda.cudart().cudaHostUnregister(content.ctypes.data)


def _touch(content: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """Fault every page in, from several threads."""
    step = -(-len(content) // _TOUCHING_THREADS // mmap.PAGESIZE) * mmap.PAGESIZE

    def touch(start: int) -> None:
        content[start : start + step : mmap.PAGESIZE] = 0

    with ThreadPoolExecutor(_TOUCHING_THREADS) as pool:
        list(pool.map(touch, range(0, len(content), step)))


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as a numpy array, bfloat16 as that of ml_dtypes; no copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
