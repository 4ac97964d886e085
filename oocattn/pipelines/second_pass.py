"""A second pass over the pairs of a finished result: a run of its own, whose result lies in the folder of job state.

A pass that was cut off goes on where it is asked for again. What it leaves is removed when it was judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from oocattn.errors import BudgetError, IntegrityError, ResultExistsError
from oocattn.pipelines import session
from oocattn.pipelines.existing import Request, check_chosen, find
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import Callback
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.candidates import Choices
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import SecondPass
from oocattn.storage.inputs.dataset import Dataset, check_poses
from oocattn.storage.inputs.opening import InputsLike, open_recorded
from oocattn.storage.paths import ResultPaths
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import RunState
from oocattn.storage.results.locking import hold_lock
from oocattn.storage.results.summary import PlanRecord, ResultAttributes

NAME = "all-rows.zarr"
"""Of its result, in the folder of job state of the result that it is of."""

KERNEL = "weights"

_OTHER_DIVISION = {"cqs": "strips", "strips": "cqs"}


@dataclass(frozen=True)
class FirstPass:
    """A finished result, its arrays, problem and dataset, and what it records of its plan."""

    paths: ResultPaths
    arrays: ResultArrays
    problem: Problem
    dataset: Dataset
    plan: PlanRecord

    @classmethod
    def open(
        cls, paths: ResultPaths, arrays: ResultArrays, inputs: InputsLike | None, storage_options: StorageOptions | None
    ) -> FirstPass:
        """What a result records, with its dataset. Raises as `open_recorded` and `check_poses`."""
        recorded = ResultAttributes.read(paths)
        problem, place = recorded.problem, recorded.dataset
        biased = bool(problem.bias_heads)
        dataset = open_recorded(place.location, place.tensors, inputs, key_bias=biased, storage_options=storage_options)
        check_poses(dataset, problem, "result")
        return cls(paths, arrays, problem, dataset, recorded.plan)


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves: its arrays, where they are, and the division by which they were computed."""

    arrays: ResultArrays
    location: str
    decomposition: str

    @property
    def computed_by(self) -> str:
        """Kernel and division, in words."""
        return f"kernel {KERNEL}, {self.decomposition}"

    def is_other(self, first: FirstPass) -> bool:
        """Whether kernel and division are both others than those of the first pass."""
        return first.plan.kernel != KERNEL and self.decomposition != first.plan.decomposition


@contextmanager
def second_pass(
    first: FirstPass,
    seed: int,
    host_memory: int,
    workplace: Workplace,
    callbacks: Sequence[Callback],
    until: float,
) -> Iterator[PassResult]:
    """Compute a second pass, with sign vectors of a seed, or find it; it is removed where what is inside has ended well.

    `host_memory` is its budget in bytes. Raises what `attention` raises.
    """
    asked = replace(first.problem, out_dtype="float32", second_pass=SecondPass(seed))
    paths = ResultPaths.at(first.paths.state / NAME)
    dataset = first.dataset.with_lse(first.arrays.lse, str(first.paths.result))
    choices = Choices(host_memory=host_memory, decomposition=_OTHER_DIVISION[first.plan.decomposition], kernel=KERNEL)
    request = _request(Request(asked, dataset, paths), choices)
    try:
        result = session.attend(request, choices, workplace, callbacks, until)
    except BudgetError:  # the other division may take more memory
        choices = replace(choices, decomposition="auto")
        result = session.attend(request, choices, workplace, callbacks, until)
    arrays = ResultArrays(result.out, result.lse)
    yield PassResult(arrays, str(paths.result), ResultAttributes.read(paths).plan.decomposition)
    with hold_lock(paths, until) as claim:
        RunState(paths, claim).remove()
    with suppress(OSError):  # there is something of others in it
        paths.state.rmdir()


def _request(request: Request, choices: Choices) -> Request:
    """What is asked for: what is there of another pass, or with other budgets, is replaced."""
    try:
        found = find(request)
        if isinstance(found, Run):
            check_chosen(found, choices)
    except (BudgetError, IntegrityError, ResultExistsError):
        return replace(request, overwrite=True)
    return request
