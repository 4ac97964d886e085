"""A survey of a finished result: what attention looked at, by a second pass over its pairs, as arrays of the result's group.

The pass is a run of its own. Its columns and sums over rows become arrays here, which are then added to the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from oocattn import clock
from oocattn.errors import LockedError, ProblemError, TimeLimitError
from oocattn.naming import as_given, named
from oocattn.pipelines.deadline import MARGIN_SECONDS
from oocattn.pipelines.engines.base import warn_of_failure
from oocattn.pipelines.passes import MADE, judging, remove_pass, removed_if_empty
from oocattn.pipelines.result import Result
from oocattn.pipelines.second_pass import Asked, FirstPass, second_pass
from oocattn.pipelines.survey_arrays import MEAN_HEAD, Making, PassArrays, wanted_arrays
from oocattn.pipelines.watch.events import Callback
from oocattn.pipelines.watch.report import RunReport, time_with_pass
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.host import default_host_memory
from oocattn.planning.plan import Plan
from oocattn.problem.second_pass import SecondPass
from oocattn.shown import NAME_WIDTH, Shown
from oocattn.storage.files import folders
from oocattn.storage.locations import output_path
from oocattn.storage.make.create import Separator
from oocattn.storage.metadata import describe_array
from oocattn.storage.paths import ATTRIBUTES, SURVEY, ResultPaths
from oocattn.storage.results.added import MARK, Added, add_arrays, missing, open_added, settle
from oocattn.storage.results.locking import hold_lock, require_lock
from oocattn.storage.results.summary import ResultAttributes
from oocattn.storage.state_folder import STORE

FORMAT = 1
"""Of the JSON document."""


@dataclass(frozen=True, repr=False)
class Survey(Shown):
    """Where a surveyed result is, the arrays that were added to it, and the query heads that it has (None: all).

    `seconds` is the wall time of the call that added them, None where all were there already. `plan` and `report` are those
    of its pass over the pairs; None where that was done before.
    """

    path: str
    arrays: Mapping[str, zarr.Array[Any]] = field(default_factory=dict)
    heads: tuple[int, ...] | None = None
    seconds: float | None = None
    plan: Plan | None = None
    report: RunReport | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON document (docs/scripts.md)."""
        return {
            "format": FORMAT,
            "path": self.path,
            "arrays": {name: describe_array(array) for name, array in self.arrays.items()},
            "seconds": self.seconds,
            "plan": None if self.plan is None else self.plan.to_json(),
            "report": None if self.report is None else self.report.to_json(),
        }

    def visualize(self, path: str | Path) -> Path:
        """Draw `pooled` as a PNG file, a panel for each head, and return its path. It takes matplotlib.

        Raises ProblemError where the map was not asked for, or of more than 64 heads, where `path` does not end in .png, or
        its folder cannot be written to, and ResultExistsError where something is at `path` that oocattn has not drawn.
        """
        from oocattn.drawing.pooled import PooledBlocks, check_picture, draw_pooled

        file, pooled = output_path(path, "picture"), self.arrays.get("pooled")
        if pooled is None:
            raise ProblemError(f"{self.path}: no map to draw: ask for 'pooled' among {named('arrays')}")
        batch, heads, *_ = pooled.shape
        check_picture(file, batch * heads)
        about = cast("dict[str, dict[str, dict[str, int]]]", pooled.attrs.asdict())[ATTRIBUTES][MARK]
        panels = np.asarray(pooled[...]).reshape(batch * heads, *pooled.shape[2:])
        draw_pooled(panels, PooledBlocks(**about), file, _panel_names(batch, self._heads_of(pooled)))
        return file

    def _heads_of(self, pooled: zarr.Array[Any]) -> Sequence[int]:
        """The query heads that a map has, none where it is of their mean."""
        if MEAN_HEAD in (getattr(pooled.metadata, "dimension_names", None) or ()):
            return ()
        return self.heads or range(pooled.shape[1])

    def __str__(self) -> str:
        return "\n".join(f"{name:<{NAME_WIDTH}} {value}" for name, value in self._table())

    def _line(self) -> str:
        return f"{', '.join(self.arrays)} of {self.path}"

    def _table(self) -> list[tuple[str, str]]:
        rows = [("path", self.path), *((name, f"{list(array.shape)} {array.dtype}") for name, array in self.arrays.items())]
        return rows if self.seconds is None else [*rows, ("time", time_with_pass(self.seconds, self.report))]


def _panel_names(batch: int, heads: Sequence[int]) -> list[str]:
    """What the panels of a map of these query heads are called; without any it is of their mean."""
    names = [f"head {head}" for head in heads] or ["heads averaged"]
    return names if batch == 1 else [f"entry {entry}, {name}" for entry in range(batch) for name in names]


def check_map(typed: str | Path, result: Result, *, mean_heads: bool) -> None:
    """Raise as `Survey.visualize` for the picture of a result's map, which is yet to be made."""
    from oocattn.drawing.pooled import check_picture

    batch, heads, *_ = result.lse.shape
    check_picture(output_path(typed, "picture"), batch * (1 if mean_heads else heads))


def survey_result(
    first: FirstPass,
    asked: Asked,
    host_memory: int | None,
    carrying_out: tuple[Workplace, Sequence[Callback], float],
    *,
    mean_heads: bool,
) -> Survey:
    """Survey a result, and add the arrays to it, unless they are there already.

    Raises what `second_pass` raises, and ResultExistsError as `missing`. Arrays of another survey are replaced unless they
    are to be kept, as its pass is. With `mean_heads` the map is averaged over heads.
    """
    start, until, overwrite = clock.now(), carrying_out[2], not asked.keep
    wanted = wanted_arrays(first.problem, asked.second_pass.reduced or (), mean_heads=mean_heads)
    found: dict[str, Any] = {}
    if missing(first.paths, wanted, overwrite=overwrite) or overwrite:
        run = _add(first, asked, wanted, host_memory, carrying_out)
        found["seconds"] = clock.now() - start
        if run.plan is not None and run.report is not None:  # whose place is no more
            found |= {"plan": run.plan, "report": replace(run.report, place=None)}
    else:
        with warn_of_failure("what a survey that was killed has left was not removed"):
            _settle(first, asked.second_pass, until)
    return Survey(str(first.paths.result), open_added(first.paths, wanted), first.problem.heads, **found)


def _add(
    first: FirstPass,
    asked: Asked,
    wanted: Mapping[str, Added],
    host_memory: int | None,
    carrying_out: tuple[Workplace, Sequence[Callback], float],
) -> Result:
    """Add arrays to a result, by a second pass; return what ran of it."""
    _check_place(first.paths)
    until, reduced = carrying_out[2], asked.second_pass.reduced or ()
    with removed_if_empty(first.paths.state), second_pass(first, asked, host_memory, *carrying_out) as found:
        made = ResultPaths.at(first.paths.state / SURVEY).state / MADE
        folders.remove_ours(made, folders.GROUP)
        arrays = PassArrays(Path(found.location), first.arrays.lse, first.problem, reduced)
        separator: Separator = "." if first.paths.stored is None else "/"
        room = default_host_memory() if host_memory is None else host_memory
        Making(arrays, wanted, made, separator, room, partial(_check_time, until)).make()
        with hold_lock(first.paths, until) as claim:
            first.require_same()
            add_arrays(first.paths, made, wanted, claim)
        return found.run


def _check_place(paths: ResultPaths) -> None:
    """Raise ProblemError where arrays could not be added, before a pass is computed."""
    if paths.mirrored:
        raise ProblemError(f"{as_given('scratch', STORE)}: a survey keeps its job state in a folder: name one, or none")
    if paths.stored is not None:
        paths.stored.check_writable()
        require_lock(paths)


def _check_time(until: float) -> None:
    """Raise TimeLimitError where arrays that are being made would not be added in time."""
    if clock.now() > until - MARGIN_SECONDS:
        raise TimeLimitError("time limit reached while the arrays of the survey were made: its pass is done and kept")


def _settle(first: FirstPass, asked: SecondPass, until: float) -> None:
    """Do what a survey that was killed had left to do once its arrays were there.

    A pass that can go on, and one of another survey, whose arrays are yet to be added, is left alone.
    """
    paths = ResultPaths.at(first.paths.state / SURVEY)
    if not folders.is_folder(paths.state):
        return
    with suppress(LockedError), judging(paths, until):
        if paths.unfinished is not None or (paths.is_taken() and ResultAttributes.read(paths).problem.second_pass != asked):
            return
        with hold_lock(first.paths, until) as claim:
            settle(first.paths, claim)
        remove_pass(paths, until)
