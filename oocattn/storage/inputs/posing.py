"""The problem that a dataset poses, as asked or as recorded."""

from __future__ import annotations

from oocattn.arguments import Dtype
from oocattn.errors import ProblemError
from oocattn.problem.problem import Problem, make_problem
from oocattn.records import differences
from oocattn.storage.inputs.axes import warn_if_transposed
from oocattn.storage.inputs.dataset import Dataset


def pose(dataset: Dataset, *, causal: bool, scale: float | None, out_dtype: Dtype | None) -> Problem:
    """The problem of a dataset with these options. Raises as `make_problem`, and warns of more heads than tokens."""
    chosen = None if out_dtype is None else str(out_dtype)
    problem = make_problem(*dataset.specs, causal=causal, scale=scale, out_dtype=chosen)
    warn_if_transposed(dataset.specs[0])
    return problem


def check_poses(dataset: Dataset, problem: Problem, whose: str) -> None:
    """Raise ProblemError where a dataset poses another problem.

    `problem` is that of a `whose`: "run" or "result".
    """
    posed = pose(dataset, causal=problem.causal, scale=problem.scale, out_dtype=problem.out_dtype)
    if posed != problem:
        raise ProblemError(
            f"{dataset.location} poses another problem than the {whose}'s ({differences(problem, posed)}): name the dataset "
            "that the run read (--dataset)"
        )
