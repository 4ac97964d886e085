"""Every shape of call that a run on GPUs will make, made once before it: cuDNN takes 45 ms to plan one (H200, cuDNN 9.19).

The launching threads of this process keep the plans (`kernels.cuda.device.launcher`).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from oocattn.kernels.cuda.device import launcher, release_cached_memory
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.operations import Operation, make_operation
from oocattn.operations.staging import stage_rows
from oocattn.operations.tiles import Tile, pieces
from oocattn.planning.plan import Plan
from oocattn.problem.mask import Cover

SAMPLED_SUBPROBLEMS = 32  # cut at each end of a head group: others have the same shapes

logger = logging.getLogger("oocattn")


class Shape(NamedTuple):
    """The shape of a tile: rows of the piece, rows that attend any key, keys."""

    piece_rows: int
    rows: int
    keys: int
    cover: Cover


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
    heads, dtype = len(problem.head_group(0).query_heads), getattr(torch, problem.dtype)
    with torch.cuda.device(gpu):
        queries = torch.randn((heads * tiles.query, problem.head_dim), dtype=dtype, device=gpu)
        keys = [
            torch.randn(source.shape(heads_of_key(operation, plan, source.name), tiles.key), dtype=source.dtype, device=gpu)
            for source in operation.key_inputs
        ]
        state = AttentionState.empty(heads, tiles.query, problem.value_dim, gpu)
        for shape, tile in sample_tiles(plan, operation).items():
            query = queries[: heads * shape.piece_rows].view(heads, shape.piece_rows, problem.head_dim)
            rows = state.rows(0, shape.piece_rows)
            operation.compute(0, tile, (query,), [key[:, : shape.keys] for key in keys], rows)
        torch.cuda.synchronize(gpu)


def heads_of_key(operation: Operation, plan: Plan, name: str) -> int:
    """Heads of an input that the first head group stages."""
    return len(operation.heads(name, plan.problem.head_group(0)))


def sample_tiles(plan: Plan, operation: Operation) -> dict[Shape, Tile]:
    """A tile of each shape that a GPU computes, in the order in which they first come."""
    found: dict[Shape, Tile] = {}
    division = plan.division_of(0)
    indices = [*division.indices[:SAMPLED_SUBPROBLEMS], *division.indices[SAMPLED_SUBPROBLEMS:][-SAMPLED_SUBPROBLEMS:]]
    for index in indices:
        subproblem = division.subproblem(index)
        staged = stage_rows(plan, 0, subproblem)
        for block in subproblem.blocks:
            for rows in pieces(plan.query_rows(block.query_chunk), plan.tiles.query):
                for tile in operation.tiles(0, block, staged, rows, plan.tiles.key):
                    shape = Shape(len(rows), len(tile.rows), len(tile.keys), tile.cover)
                    found.setdefault(shape, tile)
    return found
