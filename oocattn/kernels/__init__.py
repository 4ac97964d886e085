"""Kernels: partial attention on a device, and merging; no disks, plans or tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oocattn.imports import lazy_attributes
from oocattn.kernels.registry import default_kernel, device_type, get_kernel, kernel_names, require_kernel

if TYPE_CHECKING:
    from oocattn.kernels.kernel import Kernel, Operands
    from oocattn.kernels.merging import enter, finalise, fold, merge
    from oocattn.kernels.state import AttentionState

__all__ = [
    "AttentionState",
    "Kernel",
    "Operands",
    "default_kernel",
    "device_type",
    "enter",
    "finalise",
    "fold",
    "get_kernel",
    "kernel_names",
    "merge",
    "require_kernel",
]

_MODULES = {  # which import PyTorch: the names of kernels are known without it
    "oocattn.kernels.kernel": ["Kernel", "Operands"],
    "oocattn.kernels.merging": ["enter", "finalise", "fold", "merge"],
    "oocattn.kernels.state": ["AttentionState"],
}

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
