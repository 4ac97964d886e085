"""Other budgets: the words of a refusal, and of a warning of overhead (tasks and durable files). Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

from oocattn.errors import BudgetError
from oocattn.naming import named, setting
from oocattn.planning.plan import Plan
from oocattn.units import ceil_div, format_bytes, format_seconds, round_up

HOPELESS_TIMES, HOPELESS_SECONDS = 20.0, 60.0
"""Overhead of a hopeless plan: times its work, and seconds; it exceeds both."""

MOST_TASKS_A_SECOND, NOTICED_SECONDS = 100.0, 2.0
"""Limits of a crowded plan: tasks a second of work, seconds of overhead."""

LARGER = (2, 4)  # multiples of a budget at which plans are compared
WORTHWHILE_SPEEDUP = 1.5  # by how many times faster a plan must be for a larger budget to be named

MIB = 1 << 20

Replan = Callable[[int], Plan | None]  # the plan of so many times the budgets, if any fits

BudgetName = Literal["device", "host"]

PlanWith = Callable[[BudgetName, int], Plan | None]  # the plan where one budget is so many bytes, if any fits


def is_hopeless(plan: Plan) -> bool:
    """True if a plan spends nearly all its time on tasks and files."""
    return plan.overhead_seconds > max(HOPELESS_SECONDS, HOPELESS_TIMES * plan.work_seconds)


def is_crowded(plan: Plan) -> bool:
    """True if a plan spends so much time on tasks and files that users should know."""
    working, tasks = plan.work_seconds, plan.link("tasks").amount
    crowded = tasks > MOST_TASKS_A_SECOND * working or plan.overhead_seconds > working
    return crowded and plan.overhead_seconds > NOTICED_SECONDS


def faster_plans(plan: Plan, replan: Replan) -> list[tuple[int, Plan]]:
    """Multiples of a plan's budgets worth their memory, ascending, with their plans."""
    found = [(1, plan)]
    for times in LARGER:
        larger = replan(times)
        if larger is not None and larger.seconds * WORTHWHILE_SPEEDUP < found[-1][1].seconds:
            found.append((times, larger))
    return found[1:]


def crowded_warning(plan: Plan, replan: Replan) -> str:
    """Say how much of a crowded plan is overhead, and name a better choice."""
    tasks, files, computing = (plan.link(name) for name in ("tasks", "files", "compute"))
    found = (
        f"this plan spends {format_seconds(tasks.seconds)} on {tasks.amount:,.0f} tasks and "
        f"{format_seconds(files.seconds)} on {files.amount:,.0f} files for {format_seconds(computing.seconds)} of computing"
    )
    unpinned = replan(1)
    if unpinned is not None and unpinned.seconds * WORTHWHILE_SPEEDUP < plan.seconds:
        seconds = format_seconds(unpinned.seconds)
        return (
            f"{found}: leave {named('chunks')} and {named('decomposition')} to the plan, which then takes {seconds} in all"
        )
    faster = faster_plans(plan, replan)
    if not faster:
        return f"{found}: no larger budget is much faster"
    best = faster[-1][1]
    budgets = {"device": (best.peak_device, plan.device_memory), "host": (best.peak_host, plan.host_memory)}
    options = [setting(f"{name}_memory", _in_mib(peak)) for name, (peak, budget) in budgets.items() if peak > budget]
    return f"{found}: {' and '.join(options)} takes {format_seconds(best.seconds)} in all"


def refuse(plans: Sequence[Plan], chosen: Plan | None, plan_with: PlanWith) -> BudgetError | None:
    """Refuse budgets without a plan, or with only a hopeless one (`chosen`) where a larger budget has a better one.

    The error names the budget that is too small, the smallest that works, and what larger ones give. None: accept them.
    """
    with_scratch = [plan for plan in plans if plan.scratch_fits]
    if not with_scratch:
        return _scratch_error(plans)
    on_device = [plan for plan in with_scratch if plan.peak_device <= plan.device_memory]
    names: list[BudgetName] = ["device"] if not on_device else ["host"] if chosen is None else ["host", "device"]
    for name in names:
        peaks = [_peak(plan, name) for plan in (on_device if name == "host" else with_scratch)]
        smallest, least = _smallest(peaks, _budget(plans[0], name), partial(plan_with, name))
        if chosen is None or (least is not None and not is_hopeless(least)):
            return _too_small(name, _budget(plans[0], name), chosen, smallest, least, plan_with)
    return None


def _smallest(peaks: Iterable[int], budget: int, plan_of: Callable[[int], Plan | None]) -> tuple[int, Plan | None]:
    """The smallest larger budget that has a plan, not hopeless if possible; no plan where the other is too small as well."""
    steps = sorted({round_up(peak, MIB) for peak in peaks if peak > budget})
    first: tuple[int, Plan | None] | None = None
    for step in steps:
        plan = plan_of(step)
        if plan is not None and not is_hopeless(plan):
            return step, plan
        if plan is not None and first is None:
            first = step, plan
    return first or (steps[0] if steps else budget, None)


def _too_small(
    name: BudgetName, budget: int, hopeless: Plan | None, smallest: int, least: Plan | None, plan_with: PlanWith
) -> BudgetError:
    problem = "is too small for any tile of this problem"
    if hopeless is not None:
        problem = f"would take {format_seconds(hopeless.seconds)}, nearly all of it for tasks and files"
    words = f"{named(f'{name}_memory')} {format_bytes(budget)} {problem}: the smallest that works is {_in_mib(smallest)}"
    if least is None:
        return BudgetError(words)
    larger = faster_plans(least, lambda times: plan_with(name, smallest * times))
    shown = [f"{_in_mib(smallest * times)} ({format_seconds(plan.seconds)})" for times, plan in larger]
    return BudgetError(", ".join([f"{words} ({format_seconds(least.seconds)})", *shown]))


def _budget(plan: Plan, name: BudgetName) -> int:
    return plan.device_memory if name == "device" else plan.host_memory


def _peak(plan: Plan, name: BudgetName) -> int:
    return plan.peak_device if name == "device" else plan.peak_host


def _scratch_error(plans: Sequence[Plan]) -> BudgetError:
    """Say that none of these plans has room for its partials."""
    smallest, found = min(plan.scratch_disk for plan in plans), plans[0].machine.scratch_disk
    advice = "make room"
    if plans[0].problem.second_pass is None:  # which has none of these options
        advice += f", do without checkpoints, {setting('checkpoint_interval', 0)}, or leave {named('decomposition')} and "
        advice += f"{named('chunks')} to the plan"
    return BudgetError(
        f"partials need at least {format_bytes(smallest)} of scratch on disk and {format_bytes(found)} is free beside the "
        f"result: {advice}"
    )


def _in_mib(count: int) -> str:
    """A number of bytes as an option takes it, rounded up."""
    return f"{ceil_div(count, MIB)}MiB"
