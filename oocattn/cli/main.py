"""The `oocattn` command: it calls what the options ask for and prints what comes back. What that does is in `api`."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

import oocattn
from oocattn import clock
from oocattn.cli.carrying_out import PlanPrinter, carrying_out
from oocattn.cli.documents import document_alone, show
from oocattn.cli.exit_codes import DONE, FAILED, TIME_LIMIT
from oocattn.cli.inputs import are_ahead, are_apart, given_inputs, given_storage_options, moved_inputs
from oocattn.cli.options import PLAN_CHOICES, Command, make_parser
from oocattn.cli.printing import Printing
from oocattn.cli.reporting import report
from oocattn.cli.signals import Signals
from oocattn.cli.surveying import survey
from oocattn.cli.usage import check_words
from oocattn.cli.verifying import verify
from oocattn.errors import OocattnError, ProblemError, TimeLimitError
from oocattn.imports import in_some_folder
from oocattn.kernels.registry import get_kernel
from oocattn.naming import on_command_line
from oocattn.pipelines.watch.history import describe_history
from oocattn.planning.ahead import AHEAD_OPTIONS, estimated_scratch
from oocattn.planning.what_if import table, what_if
from oocattn.problem.calls import ScratchBytes
from oocattn.problem_arguments import PROBLEM_OPTIONS
from oocattn.storage.files.operations import words_of
from oocattn.storage.files.outputs import check_drawing
from oocattn.storage.locations import parse_location
from oocattn.storage.remote.limits import Limit, limited
from oocattn.text import printable

_PLAN_OPTIONS = (*PROBLEM_OPTIONS, *PLAN_CHOICES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, one of `EXIT_CODES`. Bad usage raises SystemExit with it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with Printing() as printing, on_command_line():
        try:
            parser = make_parser(_COMMANDS, are_apart(arguments), are_ahead(arguments))
            options, unknown = parser.parse_known_args(arguments)
            if are_apart(arguments) and unknown and options.command in (_plan, _run) and not unknown[0].startswith("-"):
                options.parser.error(
                    f"{unknown[0]} is not expected: DATASET and --q --k --v are both given; name one of them"
                )
            options.parser.refuse_unknown(unknown)
            try:
                check_words(options)
            except ProblemError as error:
                options.parser.error(str(error))
        except SystemExit as ended:  # it has printed help, the version, or what is wrong
            if not isinstance(_say_lost(printing), BrokenPipeError | None):
                raise SystemExit(ended.code or FAILED) from None
            raise
        code = _run_command(options)
        lost = _say_lost(printing)
        return code or FAILED if lost is not None and options.command in _PRINTERS else code


def _say_lost(printing: Printing) -> Exception | None:
    """Say on standard error why something of standard output was not written; return it, or None where all of it was."""
    lost = printing.lost()
    if lost is not None and not isinstance(lost, BrokenPipeError):  # else the reader has had enough, and knows
        _say(f"standard output cannot be written: {lost}")
    return lost


def _run_command(options: argparse.Namespace) -> int:
    """Do what the options ask for; whatever stops it is one line on standard error, and an exit code."""
    with Signals() as signals, limited(math.inf) as requests:
        try:
            with document_alone(options):
                return options.command(options)  # type: ignore[no-any-return]
        except BaseException as error:
            if signals.received == signal.SIGUSR1:  # whatever came of it on its way
                _say(f"time limit reached (SIGUSR1){_failing(requests)}{_how_to_go_on(options)}")
                return TIME_LIMIT
            if signals.received or isinstance(error, KeyboardInterrupt):
                _say(f"interrupted{_failing(requests)}{_how_to_go_on(options)}")
                return 128 + (signals.received or signal.SIGINT)
            if isinstance(error, TimeLimitError):
                _say(f"{error}{_how_to_go_on(options)}")
                return TIME_LIMIT
            if isinstance(error, OocattnError | OSError | MemoryError):
                _say(" ".join(words_of(error).split()))
                return FAILED
            raise


def _say(text: str) -> None:
    """How a command ended: one line on standard error."""
    print(f"oocattn: {printable(text)}", file=sys.stderr)


def _failing(requests: Limit) -> str:
    """The server that did not answer in the end."""
    return f"; {requests.failing}: check that server and the network" if requests.failing else ""


def _how_to_go_on(options: argparse.Namespace) -> str:
    """What to do next, where the store of a result answers at once: how it ended is what is to be told."""
    with limited(clock.now()), suppress(OocattnError, OSError):
        if options.command in (_run, _resume):
            found = oocattn.status(options.result, scratch=options.scratch, **_storage_options(options))
            if found.state == "interrupted":
                return f"; go on with: {found.resume}"
            if found.state == "none":
                return "; the run had not begun: give the same command again"
        if options.command is survey or (options.command is verify and options.all_rows):
            return "; what is done is kept: give the same command again"
    return ""


def _synth(options: argparse.Namespace) -> int:
    names = ("tokens", "keys", "heads", "kv_heads", "head_dim", "value_dim", "dtype", "batch", "seed", "mean", "overwrite")
    oocattn.synthesise(options.dataset, **_chosen(options, *names))
    return _show_dataset(options)


def _import(options: argparse.Namespace) -> int:
    names = ("q", "k", "v", "key_bias", "layout", "dtype", "overwrite")
    oocattn.import_arrays(options.dataset, **_chosen(options, *names), **_storage_options(options))
    return _show_dataset(options)


def _show_dataset(options: argparse.Namespace) -> int:
    """Describe the dataset that was written to whoever asks for it."""
    if options.json:
        from oocattn.cli.datasets import WrittenDataset
        from oocattn.storage.inputs.dataset import Dataset

        show(options, WrittenDataset(Dataset.open(parse_location(options.dataset))))
    return DONE


def _plan(options: argparse.Namespace) -> int:
    if options.draw:
        check_drawing(options.draw)  # before the machine is measured, which takes a while
    plan = _make_plan(options)
    show(options, plan)
    if "device" not in options and (past := describe_history(plan)):
        print(past)
    if options.budgets:
        alternatives = what_if(plan, _scratch_of(plan, options))
        print(f"\n{table(alternatives)}")
        if options.json:
            options.document["budgets"] = [each.to_json() for each in alternatives]
    if options.draw:
        plan.visualize(options.draw)
        print(f"drawn in {printable(options.draw)}")
    return DONE


def _make_plan(options: argparse.Namespace) -> oocattn.Plan:
    if "device" in options:
        return oocattn.plan_ahead(**_chosen(options, *AHEAD_OPTIONS), engine=options.engine)
    chosen = _chosen(options, *_PLAN_OPTIONS)
    return oocattn.plan(given_inputs(options), **chosen, engine=options.engine, **_storage_options(options))


def _scratch_of(plan: oocattn.Plan, options: argparse.Namespace) -> ScratchBytes:
    """A bound on what the kernel of a plan allocates; an estimate where the device need not be here."""
    return estimated_scratch(plan.device) if "device" in options else get_kernel(plan.kernel).scratch_bytes


def _run(options: argparse.Namespace) -> int:
    chosen = _chosen(options, "result", *_PLAN_OPTIONS, "overwrite", "scratch", "lock")
    return _carry_out(options, oocattn.attention, {"inputs": given_inputs(options), **chosen})


def _resume(options: argparse.Namespace) -> int:
    chosen = _chosen(options, "result", "accept_other_bits", "check_finished", "scratch", "lock")
    return _carry_out(options, oocattn.resume, {"inputs": moved_inputs(options), **chosen})


def _carry_out(options: argparse.Namespace, function: Callable[..., oocattn.Result], chosen: dict[str, Any]) -> int:
    """Run or resume with what was chosen, and print how it ended."""
    plan_printer = PlanPrinter(silent=options.json)
    with carrying_out(options, plan_printer) as how:
        result = function(**chosen, **_storage_options(options), **how)
    if not plan_printer.started:
        untimed = f", and {options.timeline} not written" if options.timeline else ""
        print(printable(f"{result.path} is there already, of the same dataset and problem; nothing was run{untimed}"))
    if options.json:
        show(options, result)
    elif result.report is not None:
        print(result.report)
    failed = result.certificate is not None and result.certificate.outcome == "failed"  # a warning has said so
    return FAILED if failed else DONE


def _status(options: argparse.Namespace) -> int:
    def look() -> oocattn.Status:
        return oocattn.status(options.result, scratch=options.scratch, **_storage_options(options))

    if options.watch:
        from oocattn.cli.watching import LOOKING_SECONDS, LOOKING_SECONDS_ELSEWHERE, watch

        status = watch(look, LOOKING_SECONDS_ELSEWHERE if "://" in options.result else LOOKING_SECONDS)
    else:
        status = look()
    if options.json or not options.watch:
        show(options, status)
    if status.state == "interrupted" and options.watch:
        if not options.json:
            print(f"go on with: {status.resume}")
        return TIME_LIMIT
    return FAILED if status.state == "none" or status.certificate == "failed" else DONE


def _doctor(options: argparse.Namespace) -> int:
    with in_some_folder():
        from oocattn.cli.doctor import Examination, examine

    checks = []
    for check in examine():
        checks.append(check)
        if not options.json:
            print(printable(check), flush=True)
    found = Examination(tuple(checks))
    if options.json:
        show(options, found)
    return DONE if found.passed else FAILED


def _bench(options: argparse.Namespace) -> int:
    with in_some_folder():
        from oocattn.bench import Progress, Table, bench

    sizes = ("tokens", "heads", "kv_heads", "keys", "head_dim", "value_dim", "dtype")
    asked = [name for name in PROBLEM_OPTIONS if name not in ("causal", "recorded", *sizes)]
    names = (*sizes, *asked, "repeats", "warm_up", "rows", "seed", *PLAN_CHOICES)
    with closing(bench(options.folder, causal=not options.full, **_chosen(options, *names))) as records:
        for record in records:
            if isinstance(record, Table):
                show(options, record)
            else:
                print(record, file=sys.stderr if isinstance(record, Progress) else sys.stdout, flush=True)
    return DONE


def _storage_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"storage_options": given_storage_options(options)}


def _chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


_COMMANDS: dict[str, Command] = {
    "synth": _synth,
    "import": _import,
    "plan": _plan,
    "run": _run,
    "resume": _resume,
    "status": _status,
    "report": report,
    "verify": verify,
    "survey": survey,
    "doctor": _doctor,
    "bench": _bench,
}

_PRINTERS = (_plan, _status, report, verify, survey, _doctor, _bench)
"""Commands whose work is what they print: where that cannot be written, they have failed."""
