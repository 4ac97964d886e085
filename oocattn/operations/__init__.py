"""What a run computes: the inputs of a tile, the call on it, the state that it adds to, the ledger; no disks, no tasks."""

from oocattn.operations.base import Operation
from oocattn.operations.forward import Forward
from oocattn.planning.plan import Plan

__all__ = ["Operation", "make_operation"]


def make_operation(plan: Plan) -> Operation:
    """What the runs of a plan compute; a new operation is registered here."""
    return Forward(plan)
