"""A record of the processor's or GPU's way to compute, on which bits depend.

Vector instructions, the library of matrix products and its choice of code for the processor are all seen in the bits of a
small problem like the one that is run: with its kind of mask, its terms of a score and its dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.second_pass import of_second_pass
from oocattn.kernels.state import AttentionState
from oocattn.problem.given import Array, GivenArrays
from oocattn.problem.problem import Problem

ROWS, KEYS = 64, 512  # size of the problem whose bits are hashed: every vector width, some milliseconds
FIRST_KEYS = 320  # of its first call, to whose state the second one adds
MOST_KEYS = 128  # on either side of a row under a window, and of sink tokens
PREFIX = KEYS - ROWS // 2  # so that half of the rows attend more than under a causal mask


def small_problem(problem: Problem) -> Problem:
    """A problem like another: everything that is asked of that one is asked of a few rows and keys."""
    left, right = (None if side is None else min(side, MOST_KEYS) for side in problem.window_size)
    heads = min(problem.group_size, 2)
    numbers = np.array([0.25, -0.5], np.float32)[:heads]
    # Documents of different sizes, one of which has no keys.
    small: dict[str, Array] = {
        "cu_seqlens_q": np.array([0, ROWS // 4, ROWS // 2, ROWS]),
        "cu_seqlens_k": np.array([0, KEYS // 4, KEYS // 4, KEYS]),
        "seqused_k": np.array([KEYS - 1]),
        "alibi_slopes": numbers,
        "learnable_sink": numbers,
    }
    given = dict(problem.given.items())
    if "cu_seqlens_q" in given:
        given["cu_seqlens_k"] = given["cu_seqlens_q"]
    return replace(
        problem,
        batch=1,
        query_heads=heads,
        kv_heads=1,
        queries=ROWS,
        keys=KEYS,
        rows_asked=(0, ROWS),
        heads=None,
        window_size=(left, right),
        prefix=PREFIX if problem.prefix else 0,
        sink_tokens=min(problem.sink_tokens, MOST_KEYS),
        bias_heads=min(problem.bias_heads, 1),
        digests={},
        given=GivenArrays(**{name: small[name] for name in given}),
    )


def arithmetic_of(kernel: str, problem: Problem, device: str) -> dict[str, str]:
    """The arithmetic of this process on a problem, by name: torch and processor, or GPU."""
    found = {"torch": str(torch.__version__)}
    if device != "cpu":
        gpus = range(torch.cuda.device_count())
        names = {f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}" for index in gpus}
        return {**found, "gpu": " | ".join(sorted(names)) or "none"}
    capability = torch.backends.cpu.get_cpu_capability()
    return {**found, "cpu": capability, "blas": _blas(), "arithmetic": _bits(kernel, small_problem(problem))}


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


def _bits(kernel: str, problem: Problem) -> str:
    """Digest the kernel's exact result on fixed numbers: its states, and what they are at the end."""
    group, heads = problem.head_group(0), problem.query_heads
    query, key, value, bias = _numbers(
        problem.dtype, [heads * ROWS, problem.head_dim], [KEYS, problem.head_dim], [KEYS, problem.value_dim], [1, KEYS]
    )
    operands = Operands(
        query.view(heads, ROWS, problem.head_dim),
        key,
        value,
        problem.scores,
        make_intervals(problem.mask(), range(ROWS), range(KEYS)),
        problem.slopes(group),
        bias.float() if problem.bias_heads else None,
    )
    state = AttentionState.empty(heads, ROWS, problem.columns, "cpu")
    for keys in (range(FIRST_KEYS), range(FIRST_KEYS, KEYS)):
        part = operands.part(range(ROWS), keys)
        if problem.second_pass is not None:
            part = of_second_pass(part, problem.second_pass, _log_sums(operands))
        get_kernel(kernel).attend(part, state)
    out, lse = torch.empty_like(state.num), torch.empty_like(state.den)
    finalise(state, out, lse, problem.sinks(group))
    digest = hashlib.sha256()
    for tensor in (state.num, state.den, state.max, out, lse):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _log_sums(operands: Operands) -> torch.Tensor:
    """The log-sum-exp of each row [g, n]."""
    state = AttentionState.empty(len(operands.query), operands.rows, operands.value.shape[1], "cpu")
    get_kernel("reference").attend(operands, state)
    return state.max + torch.log(state.den)


def _numbers(dtype: str, *shapes: list[int]) -> list[torch.Tensor]:
    """Tensors of fixed numbers between -2 and 2."""
    sizes = [rows * columns for rows, columns in shapes]
    numbers = torch.arange(sum(sizes), dtype=torch.int64, device="cpu")
    numbers.mul_(2654435761).remainder_(1 << 16)  # Knuth's multiplicative hashing
    values = numbers.to(torch.float32).div_(1 << 14).sub_(2.0).to(getattr(torch, dtype))
    return [part.view(shape) for part, shape in zip(values.split(sizes), shapes, strict=True)]
