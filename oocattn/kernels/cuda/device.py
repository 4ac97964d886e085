"""Helpers of the kernels for GPUs: a device's abilities, its allocator."""

from __future__ import annotations

from functools import cache

import torch

from oocattn.kernels.kernel import LEAST_ALONE, SMALL_SEGMENT
from oocattn.threads import ThreadPool
from oocattn.units import ceil_div, round_up

_MIB = 1 << 20


@cache
def launcher(device: torch.device) -> ThreadPool:
    """The one thread that launches attention on a GPU, for good: torch keeps the plans of cuDNN (45 ms each) by thread."""
    return ThreadPool(1, f"oocattn-launch-{device}")


def release_cached_memory(device: torch.device) -> None:
    """Give back to `device` torch's cached memory, and cuBLAS's workspaces."""
    with torch.cuda.device(device):
        torch._C._cuda_clearCublasWorkspaces()  # torch has no public name for it
        torch.cuda.empty_cache()


def capability_reason(device: torch.device, least: tuple[int, int] = (0, 0)) -> str:
    """Why `device` is no GPU of capability `least`, or ""; GPUs are not touched."""
    if device.type != "cuda":
        return "it runs on NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, counted from 0"
    found = torch.cuda.get_device_capability(device)
    if found < least:
        return f"it needs compute capability {'{}.{}'.format(*least)}, the GPU has {'{}.{}'.format(*found)}"
    return ""


def hopper_reason(device: torch.device) -> str:
    """The reason why `device` is no Hopper GPU; "" if it is."""
    reason = capability_reason(device, (9, 0))
    if not reason and torch.cuda.get_device_capability(device) != (9, 0):
        return "it runs on Hopper GPUs, of compute capability 9.0"
    return reason


def allocated_bytes(*sizes: int) -> int:
    """The most bytes that torch's allocator takes from an empty device for tensors (c10/core/AllocatorConfig.h).

    Up to 1 MiB they are rounded to 512 B and share segments of 2 MiB; below 10 MiB they share segments of 20 MiB; the
    rest is rounded to 2 MiB.
    """
    small = sum(round_up(size, 512) for size in sizes if size <= _MIB)
    middle = [size for size in sizes if _MIB < size < LEAST_ALONE]
    large = sum(round_up(size, SMALL_SEGMENT) for size in sizes if size >= LEAST_ALONE)
    return round_up(small, SMALL_SEGMENT) + _shared_segments(middle) * 2 * LEAST_ALONE + large


def segment_bytes(*sizes: int) -> int:
    """Bytes of one segment of which tensors of at most these sizes are cut, but for those up to 1 MiB; 0 where all are."""
    large = sum(round_up(size, 512) for size in sizes if size > _MIB)
    return max(LEAST_ALONE, round_up(large, SMALL_SEGMENT)) if large else 0


def small_bytes(*sizes: int) -> int:
    """The most bytes that torch's allocator takes for those of the tensors, of at most these sizes, that have up to 1 MiB.

    They share segments of 2 MiB, of which each holds two at least. In a small call every tensor may be small.
    """
    most = [min(round_up(size, 512), _MIB) for size in sizes if size]
    return SMALL_SEGMENT * min(ceil_div(len(most), 2), sum(most) // _MIB + 1) if most else 0


def _shared_segments(sizes: list[int]) -> int:
    """The most segments of 20 MiB for these sizes, of which two always fit in one."""
    if not sizes:
        return 0
    return min(ceil_div(len(sizes), 2), ceil_div(sum(sizes), 20 * _MIB - max(sizes)))


def default_device_memory(lanes: int) -> int:
    """Half of the memory that is free now on the fullest GPU, in bytes, for each GPU that the lanes are on."""
    gpus = torch.cuda.device_count()
    return min(lanes, gpus) * min(torch.cuda.mem_get_info(index)[0] for index in range(gpus)) // 2
