"""Partial attention and merge on a device; nothing of disks, plans or tasks belongs here."""

from oocattn.kernels.kernel import Kernel
from oocattn.kernels.merge import finalise, merge
from oocattn.kernels.partial import Partial
from oocattn.kernels.registry import default_kernel, get_kernel, kernel_names

__all__ = ["Kernel", "Partial", "default_kernel", "finalise", "get_kernel", "kernel_names", "merge"]
