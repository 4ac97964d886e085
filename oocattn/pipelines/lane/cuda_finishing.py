"""Merging and dividing states in host memory on a GPU, on a stream of their own."""

from __future__ import annotations

import torch

from oocattn.kernels import AttentionState
from oocattn.operations import Operation
from oocattn.operations.tiles import pieces
from oocattn.pipelines.lane.cuda_memory import DeviceBuffers, copy_state
from oocattn.pipelines.lane.device_time import record_event
from oocattn.planning.memory import FINALISED_ROWS


class CudaFinishing:
    """Merges partials that come from disk, and divides finished chunks."""

    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream, operation: Operation, buffers: DeviceBuffers
    ) -> None:
        self._device = device
        self._operation = operation
        self._stream = stream
        self._buffers = buffers

    def merge(self, into: AttentionState, state: AttentionState) -> None:
        """Merge on the device: both are copied there, and the sum back."""
        rows = len(state.keys)
        first, second = (merged.rows(0, rows) for merged in self._buffers.merged)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            copy_state(first, into)
            copy_state(second, state)
            self._operation.merge(first, second)
            copy_state(into, first)
            done = record_event(self._stream)
        done.synchronize()

    def finalise(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide on the device: copy each block there, divide it, and copy it back."""
        buffers = self._buffers
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for block in pieces(range(len(state.keys)), FINALISED_ROWS):
                rows = slice(block.start, block.stop)
                on_device = buffers.finalised.rows(0, len(block))
                on_device_out, on_device_lse = buffers.out[:, : len(block)], buffers.lse[:, : len(block)]
                copy_state(on_device, state.rows(block.start, block.stop))
                self._operation.finalise(on_device, on_device_out, on_device_lse)
                out[0, rows].copy_(on_device_out[0], non_blocking=True)
                lse[0, rows].copy_(on_device_lse[0], non_blocking=True)
            done = record_event(self._stream)
        done.synchronize()
