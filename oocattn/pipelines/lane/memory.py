"""Host memory of a lane: allocated once, as the plan counted it."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from traceback import clear_frames
from typing import Generic, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from oocattn.errors import BudgetError
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.planning.memory import ALIGNMENT
from oocattn.planning.plan import Plan
from oocattn.units import format_bytes, round_up

FIRST_STATES = 3  # states that are allocated after each staging slot, before the next one

T = TypeVar("T")


class Pool(Generic[T]):
    """Uninitialised pieces of memory of one kind; some may yet be allocated."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free: deque[T] = deque()
        self._error: BaseException | None = None
        self._closed = False

    def put(self, piece: T) -> None:
        """Let a piece be taken, by whoever waits for one."""
        with self._changed:
            self._free.append(piece)
            self._changed.notify()

    def take(self) -> T:
        """Take a piece, waiting for one. Raises the error of `fail` if none will come, RuntimeError for a closed pool."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._error or self._closed)
            if self._closed:
                raise RuntimeError("the lane is closed")
            if self._error and not self._free:
                raise self._error
            return self._free.popleft()

    def fail(self, error: BaseException) -> None:
        """Let nobody wait any more: no further piece will be allocated, for this reason."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the free pieces; nobody waits any more."""
        with self._changed:
            self._free.clear()
            self._error = None
            self._closed = True
            self._changed.notify_all()


States = Pool[AttentionState]  # states of one head group in host memory
OutBlock = tuple[torch.Tensor, torch.Tensor]  # host memory for a chunk of `out` [1, T, Dv] and of `lse` [1, T]


class HostMemory:
    """A lane's host memory: staging slots, states by name, and blocks of `out`, allocated by `allocate`.

    The thread of `allocator` does it as it is needed: the first chunks are read while the rest is being pinned.
    """

    def __init__(self, plan: Plan, allocate: Callable[[int], torch.Tensor], allocator: Executor) -> None:
        self._plan = plan
        self._allocate = allocate
        self._stopped = False
        self.slots: list[Future[torch.Tensor]] = [Future() for _ in range(plan.buffers.slots)]
        self.states = {name: States() for name in plan.buffers.states()}
        self.out_blocks = Pool[OutBlock]()
        self._allocated = allocator.submit(self._allocate_or_fail)

    def stop(self) -> None:
        """Let nothing more be allocated."""
        self._stopped = True

    def close(self) -> None:
        """Let go of all that was allocated; nobody uses any of it."""
        self.stop()
        wait([self._allocated])
        self.slots.clear()
        self.out_blocks.close()
        for states in self.states.values():
            states.close()

    def _allocate_or_fail(self) -> None:
        try:
            with naming(SET_UP):
                self._allocate_all()
        except BaseException as error:
            clear_frames(error.__traceback__)  # or slots among their locals would be in a reference circle, as the error is
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Raise the error in every thread that waits, or will wait, for missing memory."""
        for slot in self.slots:
            if not slot.done():
                slot.set_exception(error)
        self.out_blocks.fail(error)
        for states in self.states.values():
            states.fail(error)

    def _allocate_all(self) -> None:
        """Allocate one slot and a few states, so that work begins, then the rest in turn."""
        plan, buffers = self._plan, self._plan.buffers
        waiting = deque((name, rows) for name, (count, rows) in buffers.states().items() for _ in range(count))
        for slot in self.slots:
            slot.set_result(self._take(plan.slot_bytes))
            for _ in range(min(FIRST_STATES, len(waiting))):
                self._add_state(*waiting.pop())  # blocks and buffers before accumulators
        for _ in range(buffers.out_blocks(plan.problem)):
            arena = Arena(self._take(buffers.out_bytes(plan.problem)))
            # At the beginning of a page, where memory is pinned: so it can be written to disk directly.
            out = arena.take((1, plan.out_chunk_rows, plan.problem.columns), getattr(torch, plan.problem.out_dtype))
            self.out_blocks.put((out, arena.take((1, plan.out_chunk_rows), torch.float32)))
        while waiting:
            self._add_state(*waiting.pop())

    def _add_state(self, name: str, rows: int) -> None:
        problem = self._plan.problem
        arena = Arena(self._take(self._plan.buffers.state_bytes(problem, rows)))
        self.states[name].put(arena.state(problem.group_size, rows, problem.columns))

    def _take(self, nbytes: int) -> torch.Tensor:
        if self._stopped:
            raise RuntimeError("the lane is closed before it was set up")
        return self._allocate(nbytes)


class Arena:
    """Hands out the bytes of one allocation in order, aligned to 256 bytes."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Take a tensor from the next bytes; BudgetError where the plan counted too few."""
        count = math.prod(shape) * dtype.itemsize
        start = round_up(self._used, ALIGNMENT)
        if start + count > len(self._memory):
            raise BudgetError(
                f"the lane needs {format_bytes(start + count)} where {format_bytes(len(self._memory))} were planned"
            )
        self._used = start + count
        return self._memory[start : start + count].view(dtype).view(tuple(shape))

    def state(self, group_size: int, rows: int, value_dim: int) -> AttentionState:
        """An uninitialised state of [group_size, rows, value_dim]."""
        return AttentionState.allocate(self.take, group_size, rows, value_dim)


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as a numpy array, bfloat16 as that of ml_dtypes; no copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
