"""How many lanes of a machine without GPUs take part: a pure function of records.

A lane of a CPU is a share of the machine's cores and of its budgets. Fewer lanes lose no cores where each may use more of
them. More lanes lose memory: with an eighth of it a lane has chunks of less than an eighth of the rows, and k and v are read
more than eight times as often. So workers are left out where the budget is small and that costs no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from math import inf

from oocattn.cores import Cores, UsableCores
from oocattn.errors import BudgetError
from oocattn.planning.budgets import is_hopeless
from oocattn.planning.machine import Hardware, Machine
from oocattn.planning.plan import Plan
from oocattn.units import ceil_div

LEVEL_SECONDS = 1.1
"""Predicted seconds of plans closer than this count as equal: a busy machine changes them by a tenth or two."""

LEVEL_READS = 1.05
"""Bytes read of plans closer than this count as equal."""


def share_machine(hardware: Hardware, cores: Cores, budgets: tuple[int, int], make: Callable[..., Plan]) -> Plan:
    """The plan that `make` makes of these budgets, of a device and of a host, for the best number of lanes of a machine.

    All lanes take part where a larger budget would not have them read less. Else they are compared with half of them, a
    quarter, and so on: of those that are predicted to be about as fast as the fastest, the one that reads least is taken.
    `cores` are those that the lanes may use, and the memory that fewer of them may have. Lanes on GPUs are not left out.
    Raises what `make` raises for one lane.
    """

    def plan_with(each: Hardware, times: int = 1, *, explain: bool = True) -> Plan:
        device_memory, host_memory = (times * budget for budget in budgets)
        return make(each, device_memory=device_memory, host_memory=host_memory, explain=explain)

    def fitting(lanes: int, threads: int) -> Plan | None:
        with suppress(BudgetError):
            plan = plan_with(hardware if lanes == sharing else _fewer(hardware, lanes, threads), explain=False)
            if lanes == sharing or plan.peak_host <= plan.sharing_lanes * cores.memory:
                return plan
        return None

    def explained(plan: Plan) -> Plan:
        return plan_with(with_lanes(hardware, plan.machine)) if is_hopeless(plan) else plan

    sharing = hardware.sharing_lanes
    if hardware.device != "cpu" or sharing == 1:
        return plan_with(hardware)
    every = fitting(sharing, hardware.threads)
    if every is not None and _reads(every) <= LEVEL_READS * _reads(plan_with(hardware, sharing, explain=False)):
        return explained(every)
    alone = list(_improving((fitting(1, threads) for threads in _halves(lane_threads(cores, 1))), _reads))
    more = (fitting(lanes, lane_threads(cores, lanes)) for lanes in reversed(_halves(sharing)[1:-1]))
    plans = [*filter(None, [every]), *alone, *_improving(chain(alone[:1], more), lambda plan: plan.seconds)]
    if not plans:
        return plan_with(_fewer(hardware, 1, 1))  # which is refused: for the budget, or for what a worker may take
    fastest = min(plan.seconds for plan in plans)
    level = [plan for plan in plans if plan.seconds <= LEVEL_SECONDS * fastest]
    return explained(min(level, key=lambda plan: (_reads(plan), -plan.lanes)))


def cores_of_lanes(found: Cores | None, here: UsableCores, threads: int, workers: int) -> Cores:
    """The cores of a machine of so many workers: those `found` there, else taken to be as many as `here`.

    Where the caller lets PyTorch have fewer `threads` here, all workers together have no more than these, or one each.
    """
    cores = found or Cores(here.at_once, here.at_once)
    return cores if threads >= here.at_once else cores._replace(machine=min(cores.machine, max(threads, workers)))


def lane_threads(cores: Cores, sharing: int) -> int:
    """The threads of each of so many lanes of a machine."""
    return max(1, min(cores.lane, cores.machine // sharing))


def _halves(number: int) -> list[int]:
    """A number, half of it, and so on down to 1."""
    return [number >> power for power in range(number.bit_length())]


def _improving(plans: Iterable[Plan | None], amount: Callable[[Plan], float]) -> Iterator[Plan]:
    """The plans, from the first that is there, as long as each has less of an amount than the one before it."""
    least = inf
    for plan in plans:
        if plan is not None and amount(plan) < least:
            least = amount(plan)
            yield plan
        elif least < inf:
            return


def _fewer(hardware: Hardware, most: int, threads: int) -> Hardware:
    """The hardware where at most so many lanes take part on a machine, of so many threads each."""
    lanes = ceil_div(hardware.lanes * most, hardware.sharing_lanes)
    machine_lanes = most if most < lanes else 0
    return with_lanes(
        hardware, replace(hardware, lanes=lanes, machine_lanes=machine_lanes, most_lanes=most, threads=threads)
    )


def with_lanes(hardware: Hardware, chosen: Machine) -> Hardware:
    """The hardware with the lanes that were chosen, whose rate is as the cores that each has."""
    return replace(
        hardware,
        lanes=chosen.lanes,
        machine_lanes=chosen.machine_lanes,
        most_lanes=chosen.most_lanes,
        threads=chosen.threads,
        kernel_flops=hardware.kernel_flops * chosen.lane_cores / hardware.lane_cores,
    )


def _reads(plan: Plan) -> float:
    """The bytes that a plan reads."""
    return plan.link("read").amount
