"""Operations: the mathematics of a run; no disks, no tasks."""

from oocattn.operations.base import Operation
from oocattn.operations.forward import Forward
from oocattn.operations.second_pass import SecondPass
from oocattn.operations.survey import Survey
from oocattn.planning.plan import Plan

__all__ = ["Operation", "make_operation"]


def make_operation(plan: Plan) -> Operation:
    """The operation of a plan; a new one is registered here."""
    asked = plan.problem.second_pass
    if asked is None:
        return Forward(plan)
    return SecondPass(plan) if asked.reduced is None else Survey(plan)
