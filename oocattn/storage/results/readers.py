"""The readers of a result's arrays, once these are known to be those of its problem."""

from __future__ import annotations

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.rows import RowReader


def result_readers(problem: Problem, arrays: ResultArrays, location: str) -> dict[str, RowReader]:
    """The readers of `out` and `lse`. Raises IntegrityError where they are not the arrays of such a problem."""
    shape = problem.out_shape
    expected = {"out": (shape, problem.out_dtype), "lse": (shape[:3], "float32")}
    for name, array in arrays.by_name.items():
        found = (array.shape, array.dtype.name)
        if found != expected[name]:
            raise IntegrityError(
                f"array {name!r} of {location} is {found[1]} {list(found[0])}: expected {expected[name][1]} "
                f"{list(expected[name][0])}, as its attributes say"
            )
    return {name: RowReader(name, array, location) for name, array in arrays.by_name.items()}
