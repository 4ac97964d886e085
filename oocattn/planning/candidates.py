"""From a problem, budgets and a small description of the hardware to a `Plan`, before the first byte is read.

Planning is a pure function of records: nothing here reads data, measures hardware or starts a task. Every candidate
division is costed (memory, bytes a link, seconds) and those that do not fit the budgets are dropped. Of the rest the
fastest is taken; where predictions differ by less than 5%, partials in memory before partials on disk, of whose speed little
is known, and cyclic quorums before strips; where by less than 1%, fewer chunks before more.
"""

from __future__ import annotations

from collections.abc import Iterator

from oocattn.division.quorums import candidate_chunk_counts, quorum_size
from oocattn.errors import BudgetError, ProblemError
from oocattn.planning.cost import Candidate, cost
from oocattn.planning.plan import Hardware, InputCost, Plan
from oocattn.problem.problem import Problem
from oocattn.units import format_bytes

MAX_CHUNKS = 9507

MAX_SUBPROBLEMS = 1 << 20
"""Of a head group: to look through more of them takes longer than anybody waits for a `status`."""

CHECKPOINT_SECONDS = 60.0
"""What a kill may cost, unless it is chosen."""


FINE_SECONDS = 0.005
"""A subproblem of less would cost more to schedule than to compute: nothing finer is considered where this fits."""

TIE = 1.05
"""Divisions of different kinds whose predictions differ by less are taken for equally fast; of one kind, `CLOSE`."""

CLOSE = 1.01

DECOMPOSITIONS = ("auto", "cqs", "strips")


def make_plan(
    problem: Problem,
    hardware: Hardware,
    *,
    device_memory: int,
    host_memory: int,
    inputs: InputCost = InputCost(),  # noqa: B008 - frozen
    chunks: int | None = None,
    decomposition: str = "auto",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Plan:
    """Choose the division, tiles and place of partials that finish soonest within the budgets (bytes, over all lanes).

    `chunks` pins c and `decomposition` the kind. A kill is to cost no more than `checkpoint_seconds` (0: whatever it costs):
    where the budgets leave a choice, subproblems are short enough for that, and what is saved little enough. Raises
    ProblemError for a choice that does not exist and BudgetError, naming the smallest budget that works, where nothing fits.
    """
    if decomposition not in DECOMPOSITIONS:
        raise ProblemError(f"decomposition {decomposition!r}: expected one of {', '.join(DECOMPOSITIONS)}")
    if chunks is not None and not 1 <= chunks <= min(problem.tokens, MAX_CHUNKS):
        raise ProblemError(
            f"chunks = {chunks}: expected 1 to {min(problem.tokens, MAX_CHUNKS):,} for {problem.tokens:,} tokens"
        )
    plans: list[Plan] = []
    fine: set[str] = set()  # decompositions of which finer divisions would gain nothing
    for candidate in _candidates(problem, hardware.lanes, chunks, decomposition):
        if candidate.decomposition not in fine and candidate.division(problem).subproblems <= MAX_SUBPROBLEMS:
            plan = cost(candidate, problem, hardware, inputs, device_memory, host_memory, checkpoint_seconds)
            plans.append(plan)
            if _fits(plan, hardware) and plan.subproblem_seconds < FINE_SECONDS:
                fine.add(candidate.decomposition)
    fitting = [plan for plan in plans if _fits(plan, hardware)]
    if not fitting:
        raise _budget_error(plans, device_memory, host_memory, hardware.scratch_disk)
    prompt = [plan for plan in fitting if _keeps_to_interval(plan, hardware)] or fitting
    fastest = min(plan.seconds for plan in prompt)
    ties = [plan for plan in prompt if plan.seconds <= TIE * fastest]
    kind = min(_kind(plan) for plan in ties)
    ties = [plan for plan in ties if _kind(plan) == kind]
    fastest = min(plan.seconds for plan in ties)
    close = (plan for plan in ties if plan.seconds <= CLOSE * fastest)
    return min(close, key=lambda plan: (plan.chunks, plan.seconds, -plan.accumulators))


def _fits(plan: Plan, hardware: Hardware) -> bool:
    """Whether a plan keeps to its budgets and to the room on disk."""
    in_memory = plan.peak_device <= plan.device_memory and plan.peak_host <= plan.host_memory
    return in_memory and plan.scratch_disk <= hardware.scratch_disk


def _keeps_to_interval(plan: Plan, hardware: Hardware) -> bool:
    """Whether a kill costs no more than it may: half of that passes between saves, in the other half two subproblems are in
    flight and all accumulators are saved."""
    saving = plan.scratch_disk / hardware.write_rate if plan.saves else 0.0
    return not plan.checkpoint_seconds or saving + 2 * plan.subproblem_seconds <= plan.checkpoint_seconds / 2


def _kind(plan: Plan) -> tuple[bool, bool]:
    """How a plan divides and where it keeps partials; the preferred sort first."""
    return plan.partials == "disk", plan.decomposition != "cqs"


def _candidates(problem: Problem, lanes: int, chunks: int | None, decomposition: str) -> Iterator[Candidate]:
    limit = min(problem.tokens, MAX_CHUNKS)
    if decomposition in ("auto", "cqs"):
        for c in (chunks,) if chunks else candidate_chunk_counts(limit):
            # With more than c, a lane's next head group begins while the last one's chunks are being written.
            several = problem.head_groups > lanes
            for accumulators in (c + 2 * quorum_size(c), c) if several else (c,):
                yield Candidate("cqs", c, 0, "memory", accumulators)
            yield Candidate("cqs", c, 0, "disk", 2)
    if decomposition in ("auto", "strips"):
        for c in (chunks,) if chunks else _powers_of_two(limit):
            for span in _powers_of_two(c):
                for accumulators in (4, 2):
                    yield Candidate("strips", c, span, "memory", accumulators)


def _powers_of_two(limit: int) -> Iterator[int]:
    return (1 << power for power in range(limit.bit_length()) if 1 << power <= limit)


def _budget_error(plans: list[Plan], device_memory: int, host_memory: int, scratch_disk: int) -> BudgetError:
    """Name the budget that is too small, and the smallest that works."""
    on_disk = [plan for plan in plans if plan.scratch_disk <= scratch_disk]
    on_device = [plan for plan in on_disk if plan.peak_device <= device_memory]
    if not on_disk:
        smallest = min(plan.scratch_disk for plan in plans)
        return BudgetError(
            f"partials need at least {format_bytes(smallest)} of scratch on disk and {format_bytes(scratch_disk)} is "
            "free beside the result: make room, do without checkpoints (--checkpoint-interval 0), or leave --decomposition "
            "and --chunks to the plan"
        )
    if not on_device:
        name, budget, smallest = "device", device_memory, min(plan.peak_device for plan in on_disk)
    else:
        name, budget, smallest = "host", host_memory, min(plan.peak_host for plan in on_device)
    exact = -(-smallest // (1 << 20))
    return BudgetError(
        f"--{name}-memory {format_bytes(budget)} is too small for any tile of this problem: the smallest that works is "
        f"{exact}MiB"
    )
