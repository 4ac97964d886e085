"""The command that computes a result again, with the same bits: from its problem, its inputs and what pins its bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from oocattn.errors import OocattnError
from oocattn.pins import Pins
from oocattn.pipelines.again import how_to_pass
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.attempts import Planned
from oocattn.problem.arrays import KEY_BIAS
from oocattn.problem.problem import Problem
from oocattn.problem.recorded import RecordedCall
from oocattn.storage.files.folders import is_taken
from oocattn.storage.inputs.origin import Origin, is_place, named_inputs
from oocattn.storage.nodes import group_attributes
from oocattn.text import printable, shell_command

MOST_NUMBERS = 32
"""Numbers of an array argument that are written out; of a longer one the command says where to take it from."""

UNNAMED = "its inputs were of the caller's process, and no command names them: give them again"


def command_again(
    problem: Problem, location: str, tensors: Mapping[str, Origin], result: str, pins: Pins, host_memory: int | None = None
) -> str:
    """The command of a run over the dataset at a location, or over tensors one by one, to `result`."""
    inputs, place = named_inputs(location, tensors), result if is_place(result) else "RESULT"
    words = ["oocattn", "run", location, place] if inputs and not tensors else ["oocattn", "run", place, *(inputs or ())]
    words += _asked(problem)
    if inputs and not tensors:
        words += ["--no-key-bias"] if not problem.bias_heads and _may_have_bias(location) else []
        words += ["--no-recorded"] if _may_have_record(location) else []  # all that was asked is said here
    words += _pinned(pins)
    words += ["--host-memory", str(host_memory)] if host_memory else []
    notes = [] if inputs else [UNNAMED]
    if pins.span:
        notes.append(f"the same bits if the plan then takes {pins.span} key chunk{'s' * (pins.span > 1)} at a time again")
    longer = [name for name in problem.digests if not _is_short(problem, name)]
    if longer:
        arrays = "arrays" if len(longer) > 1 else "an array"
        notes.append(f"--{' and --'.join(longer).replace('_', '-')}: {arrays} of the result's group, by the same name")
    return printable("  # ".join([shell_command(words), *(["; ".join(notes)] if notes else [])]))


def planned_of(run: Run) -> Planned:
    """What a run was to do, with the command that repeats it."""
    plan, source = run.plan, run.header.dataset
    inputs = source.location, source.tensors
    if plan.problem.second_pass is not None:
        command = how_to_pass(run.paths, plan.problem)
    else:
        command = command_again(plan.problem, *inputs, str(run.paths.result), plan.pins, plan.host_memory)
    return Planned.of(plan, printable(source.location), command)


def _asked(problem: Problem) -> list[str]:
    """The options that pose the problem."""
    left, right = problem.window_size
    words = ["--causal"] if problem.causal else []
    if left is not None or (right is not None and not problem.causal):
        words += ["--window-size", *("none" if side is None else str(side) for side in (left, right))]
    words += ["--prefix", str(problem.prefix)] if problem.prefix else []
    words += ["--sink-tokens", str(problem.sink_tokens)] if problem.sink_tokens else []
    words += ["--scale", repr(problem.scale)] if problem.scale != 1 / math.sqrt(problem.head_dim) else []
    words += ["--softcap", repr(problem.softcap)] if problem.softcap else []
    words += ["--dtype", problem.out_dtype] if problem.out_dtype != problem.dtype else []
    words += ["--queries", ":".join(map(str, problem.rows_asked))] if problem.rows_asked != (0, problem.queries) else []
    words += ["--heads", ",".join(map(str, problem.heads))] if problem.heads is not None else []
    for name, array in problem.given.items():
        if _is_short(problem, name):
            numbers = ",".join(f"{number:.9g}" if array.dtype.kind == "f" else str(number) for number in array.tolist())
            words.append(f"--{name.replace('_', '-')}={numbers}")
    return words


def _may_have_bias(location: str) -> bool:
    """Whether a dataset has, or may have, a bias that the problem leaves out."""
    return "://" in location or is_taken(Path(location) / KEY_BIAS)


def _may_have_record(location: str) -> bool:
    """Whether a dataset says, or may say, what its model asked."""
    if "://" in location:
        return True
    with suppress(OocattnError, OSError):
        return RecordedCall.read(group_attributes(Path(location)), location) is not None
    return True


def _is_short(problem: Problem, name: str) -> bool:
    """Whether an array argument is known, and its numbers can be written out."""
    array = getattr(problem.given, name, None)
    return array is not None and array.ndim == 1 and array.size <= MOST_NUMBERS


def _pinned(pins: Pins) -> list[str]:
    words = ["--chunks", str(pins.chunks), "--decomposition", pins.decomposition, "--kernel", pins.kernel]
    return [*words, "--device-memory", str(pins.device_memory)] if pins.device_memory else words
