"""A second pass over the pairs of a finished result: a run of its own, whose result lies in the folder of job state.

A pass that was cut off goes on where it is asked for again. What it leaves is removed when it was judged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from oocattn.errors import BudgetError, IntegrityError, ProblemError, ResultExistsError
from oocattn.kernels.registry import SecondPasses, require_kernel, second_pass_kernel, share_code
from oocattn.naming import as_given, named, setting, settings
from oocattn.pipelines import session
from oocattn.pipelines.engines.base import warn_of_failure
from oocattn.pipelines.existing import Found, Request, find
from oocattn.pipelines.passes import judging, remove_pass
from oocattn.pipelines.questions import Questions
from oocattn.pipelines.result import Result
from oocattn.pipelines.run import Run, find_unfinished
from oocattn.pipelines.watch.events import Callback
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.candidates import Choices
from oocattn.planning.measure import choose_device
from oocattn.planning.plan import Plan
from oocattn.problem.arrays import weights_dtype
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import SecondPass
from oocattn.storage.files.operations import words_of
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.opening import InputsLike, open_again
from oocattn.storage.paths import ResultPaths
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.inputs_of_run import fingerprint_like
from oocattn.storage.results.readers import result_readers
from oocattn.storage.results.summary import PlanRecord, ResultAttributes
from oocattn.units import format_bytes

_OTHER_DIVISION = {"cqs": "strips", "strips": "cqs"}

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class FirstPass:
    """A finished result, its arrays, problem and dataset, what it records of its plan, and its identity at the time."""

    paths: ResultPaths
    arrays: ResultArrays
    problem: Problem
    dataset: Dataset
    plan: PlanRecord
    identity: str | None

    @classmethod
    def open(
        cls, paths: ResultPaths, arrays: ResultArrays, inputs: InputsLike | None, storage_options: StorageOptions | None
    ) -> FirstPass:
        """What a result records, with its dataset.

        Raises as `open_again`, and IntegrityError where the dataset is known to be another than that of the run, or arrays
        are not those of the problem.
        """
        recorded, identity = ResultAttributes.read(paths), paths.identity()
        result_readers(recorded.problem, arrays, str(paths.result))
        dataset = open_again(recorded.dataset, recorded.problem, "result", inputs, storage_options)
        fingerprint_like(dataset, recorded.dataset, str(paths.result))
        return cls(paths, arrays, recorded.problem, dataset, recorded.plan, identity)

    def require_same(self) -> None:
        """Raise IntegrityError where another result is there now."""
        if self.paths.identity() != self.identity:
            raise IntegrityError(f"{self.paths.result} was replaced during a second pass over it: ask for that again")


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves: its arrays, where they are, and what it records of its plan; with plan and report of the `run`."""

    arrays: ResultArrays
    location: str
    plan: PlanRecord
    run: Result

    @property
    def computed_by(self) -> str:
        """Kernel and division, in words."""
        return f"{self.plan.kernel}, {self.plan.decomposition}"

    def is_other(self, first: FirstPass) -> bool:
        """Whether kernel and division are both others than those of the first pass."""
        other = not share_code(first.plan.kernel, self.plan.kernel)
        return other and self.plan.decomposition != first.plan.decomposition


@dataclass(frozen=True)
class Asked:
    """What a second pass computes, and the name of its result in the folder of job state of the result that it is of.

    With `other` it is by another division than the first pass's, where that costs little. `kernel` pins one, `device_memory`
    is its budget in bytes. A pass that is there and can only go on otherwise is an error with `keep`; else it begins again.
    """

    second_pass: SecondPass
    name: str
    other: bool = False
    keep: bool = False
    kernel: str | None = None
    device_memory: int | None = None


@contextmanager
def second_pass(
    first: FirstPass,
    what: Asked,
    host_memory: int | None,
    workplace: Workplace,
    callbacks: Sequence[Callback],
    until: float,
) -> Iterator[PassResult]:
    """Compute a second pass, or find it; it is removed where what is inside has ended well.

    `host_memory` is its budget in bytes. Raises what `attention` raises, LockedError where another process has the same pass
    over the result, IntegrityError where the result was replaced meanwhile, and ResultExistsError for a pass that is kept.
    """
    paths = ResultPaths.at(first.paths.state / what.name)
    first.paths.make_state()
    paths.make_state()
    with judging(paths, until):
        asked = replace(first.problem, out_dtype="float32", second_pass=what.second_pass)
        request = Request(asked, first.dataset.with_lse(first.arrays.lse), paths)
        kernel = what.kernel or _kernel(asked, first.plan)
        preferred = _OTHER_DIVISION[first.plan.decomposition] if what.other else None
        choices = Choices(what.device_memory, host_memory, kernel=kernel, preferred=preferred)
        result = _compute(request, choices, what, workplace, callbacks, until)
        first.require_same()
        recorded = ResultAttributes.read(paths).plan
        yield PassResult(ResultArrays(result.out, result.lse), str(paths.result), recorded, result)
        with warn_of_failure(f"{paths.result} was not removed"):
            remove_pass(paths, until)


def _kernel(problem: Problem, first: PlanRecord) -> str:
    """The kernel that computes a second pass here.

    The CPU's for what GPUs do not compute: the proof of a result of 16-bit inputs whose weights are not rounded, for a pass
    that rounds its own could not tell.
    """
    asked, device = problem.second_pass, "cpu"
    assert asked is not None
    precise = problem.dtype != "float32" and weights_dtype(problem.dtype, first.rounds_weights) == "float32"
    if asked.reduced is not None or not precise:
        with suppress(ProblemError):  # of GPUs that are lost in a fork
            device = choose_device(None)
    passes: SecondPasses = "proofs" if asked.reduced is None else "surveys"
    return second_pass_kernel(passes, device, problem.dtype, problem.head_dim, problem.value_dim)


def _refusal(begun: Run, choices: Choices, what: Asked) -> str:
    """Why a pass that was begun cannot go on with its kernel; "" if it can."""
    kernel, problem = begun.plan.kernel, begun.plan.problem
    if what.kernel is not None and what.kernel != kernel:
        return f"it began with kernel {kernel!r}"
    if choices.kernel != kernel:
        try:
            require_kernel(kernel, choose_device(kernel), problem.dtype, problem.head_dim, problem.value_dim)
        except ProblemError as error:
            return words_of(error)
    return ""


def _find(request: Request, choices: Choices, what: Asked) -> tuple[Run | Found, str]:
    """The pass that is there, and why it cannot go on as is asked; "" if it can, or if there is none.

    Raises ResultExistsError where it is kept.
    """
    try:
        found = find(request)
        refused = _refusal(found, choices, what) if isinstance(found, Run) else ""
    except IntegrityError as error:  # it can go on nowhere
        return Found.NOTHING, words_of(error)
    except ResultExistsError as error:
        differing = _differing(request)
        if what.keep and not differing:
            raise
        found, refused = Found.NOTHING, differing or words_of(error)
    if refused and what.keep:
        raise ResultExistsError(
            f"{request.paths.result}: a second pass that was begun there cannot go on ({refused}): ask for it as then, or "
            f"throw it away with {setting('overwrite', True)}"
        )
    return found, refused


def _differing(request: Request) -> str:
    """In what a pass that is there differs from the one that is asked for; "" where nothing of ours is there."""
    try:
        begun = find_unfinished(request.paths, recost=False)
        problem = ResultAttributes.read(request.paths).problem if begun is None else begun.plan.problem
    except IntegrityError:
        return ""
    found, asked = problem.second_pass, request.problem.second_pass
    if found != asked and found is not None and found.reduced is not None:
        return f"it began with {settings(Questions.of(problem).options)}"
    return "it was asked for with other options or inputs, or began in another version of oocattn"


def _check_budget(name: str, budget: int | None, needed: int, plan: Plan) -> None:
    """Raise BudgetError where a pass that was begun takes more than it is given now."""
    if budget is not None and budget < needed:
        asked = plan.problem.second_pass
        instead = f", or begin again with another {named('seed')}" if asked and asked.seed is not None else ""
        raise BudgetError(
            f"{as_given(name, format_bytes(budget))}: the second pass that was begun takes {format_bytes(needed)}; give that"
            f"{instead}"
        )


def _compute(
    request: Request,
    choices: Choices,
    what: Asked,
    workplace: Workplace,
    callbacks: Sequence[Callback],
    until: float,
) -> Result:
    """Go on with a pass that is there, or begin one."""
    found, refused = _find(request, choices, what)
    if refused:
        logger.warning("a second pass that was begun cannot go on, and begins again (%s)", refused)
        request, found = replace(request, overwrite=True), Found.NOTHING
    if isinstance(found, Run):
        _check_budget("host_memory", choices.host_memory, found.plan.peak_host, found.plan)
        _check_budget("device_memory", choices.device_memory, found.plan.peak_device, found.plan)
        return session.attend(request, Choices(kernel=found.plan.kernel), workplace, callbacks, until)
    return session.attend(request, choices, workplace, callbacks, until)
