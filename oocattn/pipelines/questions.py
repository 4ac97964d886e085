"""What a survey asks for, and the reductions of weights that its pass then computes: each follows from the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oocattn.errors import ProblemError
from oocattn.naming import named
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import ARRAYS, Reduced
from oocattn.units import ceil_div

MOST_KEYS = (1 << 31) - (1 << 24)
"""Keys whose numbers are kept in 32 bits."""


@dataclass(frozen=True)
class Questions:
    """What the pass of a survey is asked for: arrays, keys of each row, and blocks along a side of the map."""

    arrays: tuple[str, ...] = ARRAYS
    top: int = 8
    pools: int = 1024

    def reduced(self, problem: Problem) -> tuple[Reduced, ...]:
        """What the second pass is asked for. Raises ProblemError for keys whose numbers it cannot keep."""
        if "top_keys" in self.arrays and problem.keys > MOST_KEYS:
            raise ProblemError(
                f"{problem.keys:,} keys: top_keys of at most {MOST_KEYS:,}; leave it out of {named('arrays')}"
            )
        every = {
            "received": Reduced("received"),
            "entropy": Reduced("entropy", (), 1),
            "top_keys": Reduced("top_keys", (self.top,), 2 * self.top),
            "pooled": Reduced("pooled", self.pool_sizes(problem)),
        }
        return tuple(every[name] for name in ARRAYS if name in self.arrays)

    def pool_sizes(self, problem: Problem) -> tuple[int, int, int, int]:
        """Rows and keys of a pool of the map, its first row, and how many pools of keys there are."""
        rows, keys = (ceil_div(count, min(self.pools, count)) for count in (problem.out_rows, problem.keys))
        return rows, keys, problem.rows_asked[0], ceil_div(problem.keys, keys)

    @classmethod
    def of(cls, problem: Problem) -> Questions:
        """What the survey asked for that a second pass is computed for.

        `pools` is the default where that has blocks of the same size.
        """
        asked, top, pools = problem.second_pass, cls.top, cls.pools
        numbers = {each.name: each.numbers for each in (asked and asked.reduced) or ()}
        if "top_keys" in numbers:
            (top,) = numbers["top_keys"]
        if "pooled" in numbers and numbers["pooled"] != cls().pool_sizes(problem):
            rows, _, _, pools_of_keys = numbers["pooled"]
            pools = max(ceil_div(problem.out_rows, rows), pools_of_keys)
        return cls(tuple(numbers), top, pools)

    @property
    def options(self) -> Mapping[str, object]:
        """The options that ask for it."""
        found: dict[str, object] = {"arrays": self.arrays}
        found |= {"top": self.top} if "top_keys" in self.arrays else {}
        return found | ({"pool": self.pools} if "pooled" in self.arrays else {})
