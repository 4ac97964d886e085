"""Choice of a `Plan` among all candidates: a pure function of records.

Every candidate division is costed, and those that do not fit the budgets are dropped. Of the rest the fastest is taken;
where predictions differ by less than 5%, partials in memory before partials on disk, of whose speed little is known, and
cyclic quorums before strips; where by less than 1%, fewer chunks before more, and short spans before long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from oocattn.division.quorums import candidate_chunk_counts, quorum_size
from oocattn.errors import BudgetError, ProblemError
from oocattn.naming import as_given
from oocattn.planning.budgets import BudgetName, crowded_warning, is_crowded, is_hopeless, refuse
from oocattn.planning.cost import cost
from oocattn.planning.layout import Candidate
from oocattn.planning.live import MOST_PRUNED
from oocattn.planning.machine import Hardware, InputCost
from oocattn.planning.options import CHECKPOINT_SECONDS, DECOMPOSITIONS, MAX_CHUNKS, MAX_SUBPROBLEMS
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div

FINE_SECONDS = 0.005  # seconds of a subproblem below which scheduling costs more than computing
TIE_RATIO = 1.05  # predictions of two kinds of division closer than this count as equal

CLOSE_RATIO = 1.01
PREFERRED_RATIO = 1.25  # times the fastest that a preferred kind of division may take


@dataclass(frozen=True)
class Choices:
    """What a user chose of a plan, None for what is left to it: budgets in bytes, what a kill may cost in seconds.

    `precise` leaves out kernels that round softmax weights to 16 bits. `preferred` is the kind of division that is taken
    where it costs little.
    """

    device_memory: int | None = None
    host_memory: int | None = None
    chunks: int | None = None
    decomposition: str = "auto"
    kernel: str | None = None
    checkpoint_seconds: float | None = None
    precise: bool = False
    preferred: str | None = None


def make_plan(
    problem: Problem,
    hardware: Hardware,
    *,
    device_memory: int,
    host_memory: int,
    inputs: InputCost = InputCost(),  # noqa: B008 - frozen
    chunks: int | None = None,
    decomposition: str = "auto",
    preferred: str | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    to_store: bool = False,
    explain: bool = True,
) -> Plan:
    """Choose the division, tiles and place of partials that finish soonest.

    Budgets are bytes over all lanes. `chunks` pins c and `decomposition` the kind; a `preferred` kind is chosen where it
    keeps partials in memory and takes at most a quarter longer. Where the budgets leave a choice, a kill costs no more than
    `checkpoint_seconds` (0: whatever it costs). `to_store` says that the result is sent to a store, which takes memory.
    Raises ProblemError for a choice that does not exist and BudgetError, naming the smallest budget that works and what
    larger ones give, where nothing fits, or only a hopeless plan does and a larger budget has one that is not. Without
    `explain` no larger budgets are looked for: the error does not name any, and a hopeless plan is returned.
    """
    _check_choices(problem, chunks, decomposition)
    candidates = list(_candidates(problem, hardware.lanes, chunks, decomposition))

    def cost_all(device: int, host: int) -> list[Plan]:
        given = problem, hardware, inputs, device, host, checkpoint_seconds
        return _cost_all(candidates, lambda each: cost(each, *given, to_store=to_store))

    plans = cost_all(device_memory, host_memory)
    chosen = _choose(plans)
    if chosen is not None and not (explain and is_hopeless(chosen)):
        return _preferred(plans, chosen, preferred)
    if not explain:
        raise BudgetError("these budgets are too small for any plan")

    def plan_with(name: BudgetName, budget: int) -> Plan | None:
        budgets = (budget, host_memory) if name == "device" else (device_memory, budget)
        if hardware.device == "cpu" or name == "host":  # only tiles on a GPU depend on a budget
            # Others would be left out below; to make them first takes most of the time.
            fitting = (plan for plan in plans if plan.peak_device <= budgets[0] and plan.peak_host <= budgets[1])
            return _choose([replace(plan, device_memory=budgets[0], host_memory=budgets[1]) for plan in fitting])
        return _choose(cost_all(*budgets))

    refusal = refuse(plans, chosen, plan_with)
    if refusal is not None:
        raise refusal
    assert chosen is not None
    return chosen


def _check_choices(problem: Problem, chunks: int | None, decomposition: str) -> None:
    """Raise ProblemError for choices that do not exist."""
    limit = min(max(problem.out_rows, problem.keys), MAX_CHUNKS)
    if decomposition not in DECOMPOSITIONS:
        raise ProblemError(f"{as_given('decomposition', decomposition)}: expected one of {', '.join(DECOMPOSITIONS)}")
    if chunks is not None and not 1 <= chunks <= limit:
        raise ProblemError(f"{as_given('chunks', chunks)}: expected 1 to {limit:,} for {problem.keys:,} keys")


def overhead_warning(plan: Plan, hardware: Hardware) -> str | None:
    """The warning for a plan that is mostly tasks and files; None for any other."""
    if not is_crowded(plan):
        return None

    def replan(times: int) -> Plan | None:
        try:
            return make_plan(
                plan.problem,
                hardware,
                device_memory=times * plan.device_memory,
                host_memory=times * plan.host_memory,
                inputs=plan.inputs,
                checkpoint_seconds=plan.checkpoint_seconds,
                to_store=plan.to_store,
            )
        except BudgetError:
            return None

    return crowded_warning(plan, replan)


def _cost_all(candidates: Iterable[Candidate], cost_of: Callable[[Candidate], Plan]) -> list[Plan]:
    """The plan of each candidate that may be the best."""
    plans: list[Plan] = []
    enough: dict[str, int] = {}  # chunks of each decomposition with which a plan fits and is fine enough
    settled: Candidate | None = None
    for candidate in candidates:
        division = replace(candidate, partials="memory", accumulators=0)
        if division != settled and candidate.chunks <= enough.get(candidate.decomposition, MAX_CHUNKS):
            plans.append(plan := cost_of(candidate))
            settled = division if _is_settled(plan) else settled
            if plan.fits and plan.scratch_fits and plan.subproblem_seconds < FINE_SECONDS and not is_hopeless(plan):
                enough.setdefault(candidate.decomposition, candidate.chunks)
    return plans


def _is_settled(plan: Plan) -> bool:
    """True if no plan of the same division with other places of partials can be better.

    It keeps them in memory, at no cost. On a GPU those on disk leave more room for tiles; several lanes share them better.
    """
    free = plan.partials == "memory" and not plan.link("partials").amount
    alone = plan.device == "cpu" and plan.lanes == 1
    return free and alone and plan.fits and plan.scratch_fits and not is_hopeless(plan) and _keeps_to_interval(plan)


def _choose(plans: Sequence[Plan]) -> Plan | None:
    """The best of the plans that fit; None where none does."""
    fitting = [plan for plan in plans if plan.fits and plan.scratch_fits]
    if not fitting:
        return None
    prompt = [plan for plan in fitting if _keeps_to_interval(plan)] or fitting
    fastest = min(plan.seconds for plan in prompt)
    ties = [plan for plan in prompt if plan.seconds <= TIE_RATIO * fastest]
    kind = min(_kind(plan) for plan in ties)
    ties = [plan for plan in ties if _kind(plan) == kind]
    fastest = min(plan.seconds for plan in ties)
    close = (plan for plan in ties if plan.seconds <= CLOSE_RATIO * fastest)
    return min(close, key=lambda plan: (plan.chunks, plan.span, -plan.accumulators))


def _preferred(plans: Sequence[Plan], chosen: Plan, preferred: str | None) -> Plan:
    """The best of the preferred kind of division, where that costs little; else the one that was chosen."""
    of_kind = _choose([plan for plan in plans if plan.decomposition == preferred and plan.partials == "memory"])
    if of_kind is None or is_hopeless(of_kind) or of_kind.seconds > PREFERRED_RATIO * chosen.seconds:
        return chosen
    return of_kind


def _keeps_to_interval(plan: Plan) -> bool:
    """True if a kill costs no more than it may: half of it between saves, in the other half saving and two in flight."""
    saving = plan.saving_seconds if plan.saves else 0.0
    return not plan.checkpoint_seconds or saving + 2 * plan.subproblem_seconds <= plan.checkpoint_seconds / 2


def _kind(plan: Plan) -> tuple[bool, bool, bool]:
    """Whether lanes are idle, place of partials and kind of division; the preferred one first."""
    chunks = 1 if plan.decomposition == "cqs" else plan.query_chunks  # that lanes may merge by themselves
    shares = plan.subproblems if plan.partials == "disk" else plan.problem.head_groups * chunks
    return shares < plan.lanes, plan.partials == "disk", plan.decomposition != "cqs"


def _candidates(problem: Problem, lanes: int, chunks: int | None, decomposition: str) -> Iterator[Candidate]:
    rows, keys = problem.out_rows, problem.keys
    if decomposition in ("auto", "cqs"):
        square = problem.out_rows == problem.keys  # else a triangle is cut off, and its live pairs are counted one by one
        regular = all(mask.is_full or (mask.is_triangular and square) for mask in problem.masks)
        limit = min(max(rows, keys) if decomposition == "cqs" else min(rows, keys), MAX_CHUNKS if regular else MOST_PRUNED)
        for c in (chunks,) if chunks else candidate_chunk_counts(limit):
            # With more than c, a lane's next head group begins while the last one's chunks are being written.
            several = problem.head_groups > lanes
            for accumulators in (c + 2 * quorum_size(c), c) if several else (c,):
                yield Candidate("cqs", c, c, 0, "memory", accumulators)
            yield Candidate("cqs", c, c, 0, "disk", 2)
    if decomposition in ("auto", "strips"):
        for c in (chunks,) if chunks else _powers_of_two(min(keys, MAX_CHUNKS)):
            for query_chunks in dict.fromkeys((min(c, rows), _chunks_in_proportion(c, rows, keys))):
                yield from _strips(query_chunks, c, problem.head_groups, lanes)


def _strips(query_chunks: int, chunks: int, head_groups: int, lanes: int) -> Iterator[Candidate]:
    """Strips of so many chunks, with spans of all sizes."""
    for span in _powers_of_two(chunks):
        if query_chunks * ceil_div(chunks, span) > MAX_SUBPROBLEMS:
            continue
        for accumulators in (4, 2):
            yield Candidate("strips", query_chunks, chunks, span, "memory", accumulators)
        if head_groups * query_chunks < lanes:  # else each lane has query chunks of its own, which it merges in memory
            yield Candidate("strips", query_chunks, chunks, span, "disk", 2)


def _chunks_in_proportion(chunks: int, rows: int, keys: int) -> int:
    """The query chunks that have about as many rows as key chunks have keys: a power of two, unless there are as many."""
    if rows == keys:
        return chunks
    wanted = max(1, min(rows, MAX_CHUNKS, round(chunks * rows / keys)))
    return 1 << (wanted.bit_length() - 1)


def _powers_of_two(limit: int) -> Iterator[int]:
    return (1 << power for power in range(limit.bit_length()) if 1 << power <= limit)
