"""A record of the processor's or GPU's way to compute, on which bits depend.

Vector instructions, the library of matrix products and its choice of code for the processor are all seen in the bits of one
small call, which is made and hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.scores import Scores

ROWS, KEYS = 64, 512  # size of the call whose bits are hashed: every vector width, some milliseconds


def arithmetic_of(kernel: str, head_dim: int, dtype: str, device: str) -> dict[str, str]:
    """The arithmetic of this process, by name: torch and processor, or GPU."""
    found = {"torch": str(torch.__version__)}
    if device != "cpu":
        gpus = range(torch.cuda.device_count())
        names = {f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}" for index in gpus}
        return {**found, "gpu": " | ".join(sorted(names)) or "none"}
    capability = torch.backends.cpu.get_cpu_capability()
    return {**found, "cpu": capability, "blas": _blas(), "arithmetic": _bits(kernel, head_dim, dtype)}


def combine(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The arithmetic of several processes: where they differ, all of it."""
    names = dict.fromkeys(name for each in found for name in each)
    return {name: " | ".join(sorted({each.get(name, "none") for each in found})) for name in names}


def _blas() -> str:
    """The library of matrix products, as torch's build names it."""
    if torch.backends.mkl.is_available():
        lines = torch.__config__.show().splitlines()
        return next((line.strip(" -").partition(" for ")[0] for line in lines if "Math Kernel Library" in line), "MKL")
    found = [part for part in torch.__config__.show().replace("\n", ", ").split(", ") if part.startswith("BLAS_INFO=")]
    return found[0].partition("=")[2] if found else "unknown"


def _bits(kernel: str, head_dim: int, dtype: str) -> str:
    """Digest the kernel's exact result on fixed numbers."""
    count = (ROWS + 2 * KEYS) * head_dim
    numbers = torch.arange(count, dtype=torch.int64, device="cpu")
    numbers.mul_(2654435761).remainder_(1 << 16)  # Knuth's multiplicative hashing
    values = numbers.to(torch.float32).div_(1 << 14).sub_(2.0).to(getattr(torch, dtype))  # between -2 and 2
    query, key, value = values.split([ROWS * head_dim, KEYS * head_dim, KEYS * head_dim])
    state = AttentionState.empty(1, ROWS, head_dim, torch.device("cpu"))
    state.reset()
    key, value = key.view(KEYS, head_dim), value.view(KEYS, head_dim)
    get_kernel(kernel).attend(Operands(query.view(1, ROWS, head_dim), key, value, Scores(head_dim**-0.5)), state)
    digest = hashlib.sha256()
    for tensor in (state.num, state.den, state.max):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
