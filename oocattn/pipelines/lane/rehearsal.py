"""Every shape of call that a run on GPUs will make, made once before it: cuDNN takes 45 ms to plan one (H200, cuDNN 9.19).

The launching threads of this process keep the plans (`kernels.cuda.device.launcher`).
"""

from __future__ import annotations

import logging

import torch

from oocattn.kernels import AttentionState, get_kernel
from oocattn.kernels.cuda.device import launcher, release_cached_memory
from oocattn.operations import make_operation
from oocattn.operations.shapes import sample_tiles
from oocattn.planning.plan import Plan

logger = logging.getLogger("oocattn")


def rehearse(plan: Plan) -> None:
    """Make a plan's calls on every GPU, within the plan's memory, where the kernel plans shapes. Failures are the run's."""
    if not get_kernel(plan.kernel).plans_shapes:
        return
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for gpu, calls in [(gpu, launcher(gpu).submit(_make_calls, plan, gpu)) for gpu in gpus]:
        if error := calls.exception():
            logger.debug("the rehearsal on %s failed: %s", gpu, error)
    for gpu in gpus:
        release_cached_memory(gpu)


def _make_calls(plan: Plan, gpu: torch.device) -> None:
    problem, tiles, operation = plan.problem, plan.tiles, make_operation(plan)
    heads, dim, dtype = problem.group_size, problem.head_dim, getattr(torch, problem.dtype)
    with torch.cuda.device(gpu):
        queries = torch.randn((heads * tiles.query, dim), dtype=dtype, device=gpu)
        key, value = torch.randn((2, tiles.key, dim), dtype=dtype, device=gpu)
        state = AttentionState.empty(heads, tiles.query, dim, gpu)
        for shape, tile in sample_tiles(plan, operation).items():
            query = queries[: heads * shape.piece_rows].view(heads, shape.piece_rows, dim)
            rows = state.rows(0, shape.piece_rows)
            operation.compute(tile, (query,), (key[: shape.keys], value[: shape.keys]), rows)
        torch.cuda.synchronize(gpu)
