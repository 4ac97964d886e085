"""The base of kernels around a library's attention call: exact tiles, folding."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from oocattn.kernels.cuda.device import allocated_bytes
from oocattn.kernels.cuda.hopper import HopperKernel
from oocattn.kernels.kernel import Kernel, Operands
from oocattn.kernels.merging import fold
from oocattn.kernels.plain import PlainKernel
from oocattn.kernels.registry import MAX_KEYS
from oocattn.kernels.state import AttentionState
from oocattn.kernels.tiles import level_step, make_tiles
from oocattn.problem.arrays import DTYPES
from oocattn.problem.calls import CallSize

_OWN_BYTES = 1 << 19  # bytes that a library call allocates for seeds, counters and a workspace


class LibraryKernel(Kernel):
    """A kernel whose tiles are calls of a library: divided output and log-sum-exp.

    A call is cut into tiles of at most 65,536 keys, so that none chains more keys than is exact; rows are not cut, for large
    calls are the fast ones. A library takes plain scores, and rows that attend all keys or those up to a diagonal. Other
    calls are for the kernel `hopper`, or for torch's where that cannot serve.
    """

    rounds_weights = True

    def attend(self, operands: Operands, state: AttentionState) -> None:
        operands.check(state)
        query, key, value, scale = operands.query, operands.key, operands.value, operands.scores.scale
        rows, keys, band = operands.rows, operands.keys, operands.band
        if band is None or not band.is_open_below(rows) or not operands.is_plain:
            _general_kernel(operands).attend(operands, state)
            return
        step = level_step(keys, MAX_KEYS)
        for row, end, first, last, triangular in make_tiles(rows, keys, max(1, rows), step, upper=band.upper):
            result = self._call(query[:, row:end], key[first:last], value[first:last], scale, triangular)
            fold(state.rows(row, end), *result)
            del result  # before the next call needs the memory

    def scratch_bytes(self, call: CallSize) -> int:
        # Two tiles: the one before is let go, but torch was once seen to hold 64 MiB more than a call's (756 of 692, H200).
        heads_rows = call.group_size * call.rows
        of_call = (heads_rows * call.value_dim * DTYPES[call.dtype], heads_rows * 4)
        own = allocated_bytes(*of_call, *of_call, _OWN_BYTES, *self._buffers(call))
        if call.plain and not call.masked:
            return own
        return max(own, HopperKernel().scratch_bytes(call), PlainKernel().scratch_bytes(call))

    @abstractmethod
    def _call(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Output [g, n, Dv], last stride 1, and log-sum-exp [g, n] of one tile."""

    def _buffers(self, call: CallSize) -> tuple[int, ...]:
        """Sizes in bytes of large buffers that the library allocates beside its results."""
        return ()


def _general_kernel(operands: Operands) -> Kernel:
    """The kernel for calls that a library does not take."""
    query, value = operands.query, operands.value
    dtype = str(query.dtype).removeprefix("torch.")
    reason = HopperKernel().unsupported_reason(query.device, dtype, query.shape[-1], value.shape[-1])
    return PlainKernel() if reason else HopperKernel()


def equal_dims_reason(head_dim: int, value_dim: int) -> str:
    """The reason why values with other columns than keys cannot be served; "" if they have as many."""
    return "" if head_dim == value_dim else "it attends values with as many columns as keys, Dv = D"


def shared_by_heads(tensor: Tensor, group_size: int) -> Tensor:
    """Keys or values [m, D] as [1, g, m, D], without a copy."""
    return tensor.expand(1, group_size, *tensor.shape)
