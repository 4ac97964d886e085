"""A lane's host memory: what it allocates is what its plan counted, whatever the device and the place of partials."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import GENEROUS, GPU, MACHINE, a_problem, replanned

from oocattn import Plan
from oocattn.pipelines.lane.memory import HostMemory
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import Hardware
from oocattn.planning.memory import SEGMENT


def allocations_of(plan: Plan) -> list[int]:
    """The bytes of each allocation of a lane; nothing is allocated."""
    found: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        found.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    with ThreadPoolExecutor(1) as allocator:
        memory = HostMemory(plan, allocate, allocator)
    for slot in memory.slots:
        slot.result()  # raises the error that ended the allocating
    return found


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize(("machine", "granule"), [(MACHINE, 1), (GPU, SEGMENT)], ids=["cpu", "cuda"])
def test_a_lane_allocates_what_its_plan_counts(machine: Hardware, granule: int, partials: str) -> None:
    problem = a_problem(1 << 20, query_heads=4, kv_heads=2)
    budgets = {"device_memory": 16 << 30, "host_memory": GENEROUS}
    accumulators = {"memory": 13, "disk": 2}[partials]
    plan = make_plan(problem, machine, chunks=13, decomposition="cqs", **budgets)
    plan = replanned(plan, partials=partials, accumulators=accumulators)
    allocated = sum(-(-nbytes // granule) * granule for nbytes in allocations_of(plan))
    assert allocated == plan.buffers.nbytes(problem)
    state_of_device = problem.state_bytes(plan.chunk_rows) if plan.device == "cpu" else 0
    assert plan.peak_host >= allocated + state_of_device
