"""How to go on with an unfinished run: the command, or the call, as it works from any folder of this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from oocattn.naming import is_command, settings
from oocattn.pipelines.questions import Questions
from oocattn.pipelines.run import Run
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.origin import is_place, recorded_inputs
from oocattn.storage.paths import SURVEY, ResultPaths
from oocattn.storage.remote.options import StorageOptions, shown_options
from oocattn.storage.state_folder import STORE
from oocattn.text import printable, shell_command

_OTHERS = "  # with its other options, if it had any"


def how_to_resume(paths: ResultPaths, run: Run | None, given: StorageOptions | None) -> str:
    """The command that resumes a run to `paths`; to a caller of Python, the call. A second pass has `how_to_pass`.

    It names the inputs where they are not found again without it, and the job state of a result in a store. Of storage
    options, whose names are those of `given`, it shows no value that may be a secret. Where something is not known, a
    remark says so.
    """
    if run is not None and run.plan.problem.second_pass is not None:
        return how_to_pass(paths, run.plan.problem)
    dataset = None if run is None else run.header.dataset
    place, remarks = _place(paths)
    options, inputs = shown_options(given), [] if dataset is None else recorded_inputs(dataset.location, dataset.tensors)
    if dataset is None:
        remarks.append("with the inputs, unless they are local paths")
    if ... in options.values():
        remarks.append("with the values of the storage options")
    elif not options and any("://" in text and "memory://" not in text for text in (str(paths.result), *(inputs or ()))):
        remarks.append("with the storage options of the run, if it had any")
    result = str(paths.result) if is_place(str(paths.result)) else ...
    if is_command() and result is not ... and inputs is not None:
        words = _command(str(result), [*inputs, *(word for name in place for word in (f"--{name}", place[name]))], options)
    else:
        named = {"inputs": inputs[1] if inputs and inputs[0] == "--dataset" else ...} if inputs != [] else {}
        words = _call(result, {**named, **place}, options)
    return printable(words + (f" ({', and '.join(remarks)})" if remarks else ""))


def how_to_pass(paths: ResultPaths, problem: Problem) -> str:
    """The command, or the call, that goes on with the second pass of a problem at `paths`, beside its result."""
    folder, asked = paths.folder.parent, problem.second_pass
    beside = folder.name.endswith(".oocattn")
    result = str(folder.with_name(folder.name.removesuffix(".oocattn"))) if beside else ...
    options: Mapping[str, object] = {"all_rows": True}
    name, others = "verify", ""
    if paths.folder.name == SURVEY:
        usual = Questions().options
        options = {name: value for name, value in Questions.of(problem).options.items() if value != usual[name]}
        name, others = "survey", _OTHERS
    elif asked is not None and asked.seed:
        options = {**options, "seed": asked.seed}
    if is_command() and result is not ...:
        return printable(" ".join(filter(None, [shell_command(["oocattn", name, result]), settings(options)])) + others)
    return printable(_written_call(name, result, options) + others)


def _place(paths: ResultPaths) -> tuple[dict[str, str], list[str]]:
    """What says where the job state of a result in a store is, and which lock it has; and on which other host."""
    from oocattn.storage.results.marks import read_mark

    if paths.stored is None:
        return {}, []
    mark = read_mark(paths)
    state = STORE if paths.mirrored else "" if paths.state_folder is None else str(paths.state_folder)
    found = {"scratch": state if mark is None else mark.state}
    if mark is not None and mark.lock != "auto":
        found["lock"] = mark.lock
    away = mark is not None and mark.state != STORE and mark.host != socket.gethostname()
    return {name: value for name, value in found.items() if value}, [f"on host {mark.host}"] if mark and away else []


def _command(result: str, words: Sequence[str], options: Mapping[str, Any]) -> str:
    words = ["oocattn", "resume", result, *words]
    for key, value in options.items():
        words += ["--storage-option", f"{key}={'...' if value is ... else _option_text(value)}"]
    return shell_command(words)


def _option_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _call(result: object, named: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return _written_call("resume", result, {**named, **({"storage_options": dict(options)} if options else {})})


def _written_call(function: str, result: object, given: Mapping[str, object]) -> str:
    written = [_python(result), *(f"{name}={_python(value)}" for name, value in given.items())]
    return f"{'.'.join(('oocattn', function))}({', '.join(written)})"


def _python(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_python(key)}: {_python(each)}' for key, each in value.items())}}}"
    return "..." if value is ... else repr(value)
