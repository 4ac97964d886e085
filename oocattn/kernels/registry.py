"""The kernels by name. A new kernel is one new module and one line in `_KERNELS`; modules are imported on first use."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from oocattn.errors import ProblemError
from oocattn.kernels.kernel import Kernel
from oocattn.problem import DTYPES


@dataclass(frozen=True)
class _Registration:
    """Where a kernel lives, and the device types and dtypes that it is the default for."""

    name: str
    module: str
    class_name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]


_KERNELS = (  # the first that serves a device and a dtype is the default for them
    _Registration("cpu", "oocattn.kernels.cpu", "CpuKernel", ("cpu",), tuple(DTYPES)),
    _Registration("reference", "oocattn.kernels.reference", "ReferenceKernel", (), ()),
)


def kernel_names() -> tuple[str, ...]:
    """The names that `get_kernel` knows."""
    return tuple(entry.name for entry in _KERNELS)


def get_kernel(name: str) -> Kernel:
    """The kernel of that name. Raises ProblemError naming the known ones if there is none."""
    for entry in _KERNELS:
        if entry.name == name:
            kernel: Kernel = getattr(import_module(entry.module), entry.class_name)()
            return kernel
    raise ProblemError(f"kernel {name!r} is not known: expected one of {', '.join(kernel_names())}")


def default_kernel(device: str, dtype: str) -> str:
    """The name of the kernel to use for inputs of `dtype` on `device`, written as torch does ("cpu", "cuda:0").

    Raises ProblemError if no kernel serves them.
    """
    device_type = device.partition(":")[0]
    for entry in _KERNELS:
        if device_type in entry.devices and dtype in entry.dtypes:
            return entry.name
    raise ProblemError(f"no kernel attends {dtype} on device {device!r}: name one of {', '.join(kernel_names())}")
