"""The kernels by name, imported on first use; a new one is a line in `_KERNELS`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple

from oocattn.errors import ProblemError
from oocattn.naming import named
from oocattn.problem.arrays import weights_dtype

if TYPE_CHECKING:  # PyTorch takes seconds, and the names of kernels are known without it
    import torch

    from oocattn.kernels.kernel import Kernel

DeviceType = Literal["cpu", "cuda"]
SecondPasses = Literal["proofs", "surveys"]

MAX_KEYS = 1 << 16  # the most keys to chain: beyond, the error of 16-bit matrix units grows
_LONG_KEYS = 1 << 18  # our own begins new sums within a call. With 64K keys calls were launched late (NOTES.md)
_LONG_NUMBERS = 1 << 24  # of keys of few columns, at least: a call is over sooner than others are copied and launched


class _Registration(NamedTuple):
    """A kernel's code, its type of device, and what it is.

    `default` says when it may be the default of its device, "precise": of precise runs alone. `second_passes` are those
    that it is for; `rounds_weights` is that of its class, which is not imported for it. `long_calls` says whether calls of
    more than `MAX_KEYS` are as exact, and faster.
    """

    module: str
    class_name: str
    device_type: DeviceType
    default: Literal["always", "precise", "never"] = "always"
    second_passes: tuple[SecondPasses, ...] = ()
    rounds_weights: bool = False
    long_calls: bool = False


_KERNELS = {  # of those that can serve, the first of its device type is the default: measured, hopper before cudnn
    "cpu": _Registration("oocattn.kernels.cpu", "CpuKernel", "cpu"),
    "reference": _Registration("oocattn.kernels.plain", "ReferenceKernel", "cpu", default="never"),
    "weights": _Registration("oocattn.kernels.weights", "WeightsKernel", "cpu", "never", ("proofs", "surveys")),
    "hopper": _Registration("oocattn.kernels.cuda.hopper", "HopperKernel", "cuda", rounds_weights=True, long_calls=True),
    "hopper-precise": _Registration(
        "oocattn.kernels.cuda.hopper", "HopperPreciseKernel", "cuda", default="precise", long_calls=True
    ),
    "hopper-weights": _Registration(
        "oocattn.kernels.cuda.hopper",
        "HopperWeightsKernel",
        "cuda",
        "never",
        ("proofs",),
        rounds_weights=True,
        long_calls=True,
    ),
    "hopper-survey": _Registration(
        "oocattn.kernels.cuda.hopper_survey", "HopperSurveyKernel", "cuda", "never", ("surveys",), long_calls=True
    ),
    "fa3": _Registration("oocattn.kernels.libraries.fa3", "Fa3Kernel", "cuda", rounds_weights=True),
    "cudnn": _Registration("oocattn.kernels.libraries.aten", "CudnnKernel", "cuda", rounds_weights=True),
    "flash": _Registration("oocattn.kernels.libraries.aten", "FlashKernel", "cuda", rounds_weights=True),
    "torch": _Registration("oocattn.kernels.plain", "PlainKernel", "cuda"),
}


def kernel_names(second_passes: SecondPasses | None = None) -> tuple[str, ...]:
    """The names that `get_kernel` knows: of kernels that attend, or of those for such second passes (`Kernel.shifted`)."""
    if second_passes is None:
        return tuple(name for name, entry in _KERNELS.items() if not entry.second_passes)
    return tuple(name for name, entry in _KERNELS.items() if second_passes in entry.second_passes)


def get_kernel(name: str) -> Kernel:
    """The kernel of that name; ProblemError, naming the known ones, if there is none."""
    entry = _registration(name)
    kernel: Kernel = getattr(import_module(entry.module), entry.class_name)()
    return kernel


def device_type(name: str) -> DeviceType:
    """The device of a kernel's runs: "cpu" or "cuda"; ProblemError for unknown names."""
    return _registration(name).device_type


def takes_long_calls(name: str) -> bool:
    """True if calls of a kernel are as exact, and faster, with more keys than `MAX_KEYS`; ProblemError as above."""
    return _registration(name).long_calls


def max_keys(name: str, columns: int) -> int:
    """The most keys to give to one call, which is right beyond them, too; ProblemError as above.

    `columns` are those of keys or values, of whichever has more.
    """
    return max(_LONG_KEYS, _LONG_NUMBERS // columns) if takes_long_calls(name) else MAX_KEYS


def rounds_weights(name: str) -> bool:
    """True if a kernel rounds softmax weights to the inputs' dtype (`Kernel.rounds_weights`); ProblemError as above."""
    return _registration(name).rounds_weights


def default_kernel(device: torch.device | str, dtype: str, head_dim: int, value_dim: int, *, precise: bool = False) -> str:
    """The name of the fastest kernel for a dtype, D = head_dim and Dv = value_dim on a device.

    `device` is "cpu", "cuda", "cuda:1" and so on; the reference is never chosen. `precise` leaves out kernels that round
    softmax weights to 16 bits. Raises ProblemError, with every kernel's reason, if none serves them.
    """
    device = _known_device(device)
    reasons: dict[str, list[str]] = {}
    for name in _names_for(device.type):
        reason = _reason(name, device, dtype, head_dim, value_dim, precise)
        default = _KERNELS[name].default
        if not reason and (default == "always" or (precise and default == "precise")):
            return name
        reasons.setdefault(reason, []).append(name)
    found = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    raise ProblemError(
        f"no kernel attends {_operands(dtype, head_dim, value_dim)} on {device}: "
        f"{found or 'there are kernels for cpu and cuda'}"
    )


def share_code(name: str, other: str) -> bool:
    """True if two kernels are made of the same code, so that one does not prove the other right, or if one is unknown."""
    try:
        return _registration(name).module == _registration(other).module
    except ProblemError:  # of a result that another version has computed
        return True


def second_pass_kernel(
    second_passes: SecondPasses, device: torch.device | str, dtype: str, head_dim: int, value_dim: int
) -> str:
    """The name of the kernel of second passes over a result, on a device or, if none serves there, on the CPU."""
    device = _known_device(device)
    names = _names_for(device.type, second_passes)
    return next((name for name in names if not _reason(name, device, dtype, head_dim, value_dim, False)), "weights")


def require_kernel(
    name: str, device: torch.device | str, dtype: str, head_dim: int, value_dim: int, *, precise: bool = False
) -> Kernel:
    """The kernel of that name, if it serves `dtype`, D = head_dim and Dv = value_dim on `device`.

    `precise` is that of `default_kernel`. Raises ProblemError, saying why it cannot and which kernels can, or that there is
    no such kernel.
    """
    kernel = get_kernel(name)
    device = _known_device(device)
    asked = device, dtype, head_dim, value_dim, precise
    reason = _reason(name, *asked)
    if not reason:
        return kernel
    names = _names_for(device.type, next(iter(_registration(name).second_passes), None))
    others = [other for other in names if not _reason(other, *asked)]
    raise ProblemError(
        f"kernel {name!r} cannot attend {_operands(dtype, head_dim, value_dim)} on {device}: {reason}"
        + (f"; choose one of {', '.join(others)} or" if others else ";")
        + f" leave {named('kernel')} out"
    )


def _reason(name: str, device: torch.device, dtype: str, head_dim: int, value_dim: int, precise: bool) -> str:
    """The reason why a kernel cannot serve, in words; "" if it can."""
    weights = weights_dtype(dtype, rounds_weights(name))
    if precise and weights != "float32":
        return f"it rounds softmax weights to {weights}, which {named('precise')} rules out"
    return get_kernel(name).unsupported_reason(device, dtype, head_dim, value_dim)


def _operands(dtype: str, head_dim: int, value_dim: int) -> str:
    return f"{dtype} with D = {head_dim}" + (f", Dv = {value_dim}" if value_dim != head_dim else "")


def _registration(name: str) -> _Registration:
    if name not in _KERNELS:
        raise ProblemError(f"kernel {name!r} is not known: expected one of {', '.join(kernel_names())}")
    return _KERNELS[name]


def _names_for(device_type: str, second_passes: SecondPasses | None = None) -> list[str]:
    return [name for name in kernel_names(second_passes) if _KERNELS[name].device_type == device_type]


def _known_device(device: torch.device | str) -> torch.device:
    import torch

    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ProblemError(f"device {str(device)!r} is not known to torch: expected cpu, cuda or cuda:INDEX") from error
