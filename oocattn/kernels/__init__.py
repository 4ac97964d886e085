"""Partial attention and merge on a device; nothing of disks, plans or tasks belongs here."""

from oocattn.kernels.kernel import Kernel
from oocattn.kernels.merge import enter, finalise, fold, merge
from oocattn.kernels.registry import default_kernel, device_type, get_kernel, kernel_names, require_kernel
from oocattn.kernels.state import AttentionState

__all__ = [
    "AttentionState",
    "Kernel",
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
