"""The cost of a plan that is there, computed again from its choices. Pure arithmetic."""

from __future__ import annotations

from dataclasses import asdict

from oocattn.planning.cost import cost
from oocattn.planning.layout import Candidate
from oocattn.planning.machine import Hardware
from oocattn.planning.plan import Plan
from oocattn.problem.calls import ScratchBytes


def recost(plan: Plan, scratch_bytes: ScratchBytes) -> Plan:
    """Compute again all that follows from the choices in a plan, as `cost` does."""
    hardware = Hardware(**asdict(plan.machine), scratch_bytes=scratch_bytes)
    chunks = plan.query_chunks, plan.chunks, plan.span
    candidate = Candidate(plan.decomposition, *chunks, plan.partials, plan.accumulators)
    chosen = (hardware, plan.inputs, plan.device_memory, plan.host_memory, plan.checkpoint_seconds)
    return cost(candidate, plan.problem, *chosen, tiles=plan.tiles, to_store=plan.to_store)
