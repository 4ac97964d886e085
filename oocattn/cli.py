"""The `oocattn` command: it parses options and prints what comes back. What a command does is in `api`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import oocattn
from oocattn.errors import OocattnError, ProblemError
from oocattn.kernels import kernel_names
from oocattn.pipelines.events import Callback, Event
from oocattn.pipelines.interrupts import SIGNALS, Interrupts
from oocattn.pipelines.progress import ProgressBar
from oocattn.pipelines.timeline import Timeline
from oocattn.planner import DECOMPOSITIONS
from oocattn.plans import Plan
from oocattn.problem import DTYPES
from oocattn.storage.importing import LAYOUTS, import_arrays
from oocattn.storage.synth import synthesise
from oocattn.units import parse_size

if TYPE_CHECKING:
    from distributed import Client

DONE, FAILED = 0, 1
"""Exit codes; argparse's own for bad usage is 2, and 128 and a signal's number say that it ended the command."""

PLAN_CHOICES = ("device_memory", "host_memory", "chunks", "decomposition", "kernel")
"""Options that change the plan and not the problem."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 130 interrupted, 143 terminated; 2 for bad usage."""
    options = _parser().parse_args(arguments)
    with _Signals() as signals:
        try:
            code: int = options.command(options)
        except BaseException as error:
            if signals.received or isinstance(error, KeyboardInterrupt):  # whatever came of it on its way
                print(f"oocattn: interrupted{_how_to_go_on(options)}", file=sys.stderr)
                return 128 + (signals.received or signal.SIGINT)
            if isinstance(error, OocattnError | OSError):
                print(f"oocattn: {' '.join(str(error).split())}", file=sys.stderr)
                return FAILED
            raise
    return code


class _Signals:
    """Ctrl-C and SIGTERM, where no run holds them back; the second one during a run ends the process at once."""

    received = 0

    def __enter__(self) -> _Signals:
        in_charge = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.getsignal(number) for number in SIGNALS if in_charge}
        for number, handler in self._before.items():
            if handler != signal.SIG_IGN:  # as a shell has it for what runs in the background
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if Interrupts.held:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        raise KeyboardInterrupt


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.command in (_run, _resume) and oocattn.status(options.result).state == "interrupted":
        return f"; go on with: oocattn resume {options.result}"
    return ""


def _synth(options: argparse.Namespace) -> int:
    synthesise(
        options.dataset,
        tokens=options.tokens,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
        batch=options.batch,
        seed=options.seed,
        mean=options.mean,
        overwrite=options.overwrite,
    )
    return DONE


def _import(options: argparse.Namespace) -> int:
    import_arrays(
        options.dataset,
        q=options.q,
        k=options.k,
        v=options.v,
        layout=options.layout,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    return DONE


def _plan(options: argparse.Namespace) -> int:
    plan = oocattn.plan(options.dataset, **_plan_options(options))
    print(plan)
    if options.draw:
        print(f"drawn in {plan.visualize(options.draw)}")
    return DONE


def _run(options: argparse.Namespace) -> int:
    plan_printer = _PlanPrinter()
    with _client(options.scheduler) as client:
        result = oocattn.attention(
            options.dataset,
            options.result,
            **_plan_options(options),
            client=client,
            dashboard_address=options.dashboard,
            callbacks=_listeners(options, plan_printer),
            overwrite=options.overwrite,
        )
    return _print_end(result, plan_printer, options.timeline)


def _resume(options: argparse.Namespace) -> int:
    plan_printer = _PlanPrinter()
    with _client(options.scheduler) as client:
        result = oocattn.resume(
            options.result,
            client=client,
            dashboard_address=options.dashboard,
            callbacks=_listeners(options, plan_printer),
        )
    return _print_end(result, plan_printer, options.timeline)


def _listeners(options: argparse.Namespace, plan_printer: _PlanPrinter) -> list[Callback]:
    """Those that a command line asks for."""
    listeners: list[Callback] = [plan_printer]
    if sys.stderr.isatty() if options.progress is None else options.progress:
        listeners.append(ProgressBar())
    if options.timeline:
        listeners.append(Timeline(options.timeline))
    return listeners


def _print_end(result: oocattn.Result, plan_printer: _PlanPrinter, timeline: str | None) -> int:
    if not plan_printer.printed:
        untimed = f", and {timeline} not written" if timeline else ""
        print(f"{result.path} is there already, of the same dataset and problem; nothing was run{untimed}")
    if result.report is not None:
        print(result.report)
    return DONE


def _client(scheduler: str | None) -> AbstractContextManager[Client | None]:
    """Of the scheduler at that address; None where none is given."""
    if scheduler is None:
        return nullcontext(None)
    from distributed import Client

    client: AbstractContextManager[Client] = Client(scheduler)
    return client


class _PlanPrinter:
    """A listener that prints the plan before the run's first task."""

    printed = False

    def __call__(self, event: Event) -> None:
        if event.kind == "started":
            plan, left = cast(Plan, event.detail["plan"]), cast(int, event.detail["left"])
            print(plan, end="\n\n", flush=True)
            if left < plan.subproblems:
                print(f"resumed      {left:,} of {plan.subproblems:,} subproblems are left", end="\n\n", flush=True)
            self.printed = True


def _status(options: argparse.Namespace) -> int:
    print(oocattn.status(options.result))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    chosen = {name: getattr(options, name) for name in ("rows", "seed", "dataset", "host_memory", "checksums")}
    certificate = oocattn.verify(options.result, **chosen)
    if certificate.files:
        print(f"certificate  {', '.join(certificate.files)}")
    print(certificate)
    return DONE if certificate.passed else FAILED


def _doctor(options: argparse.Namespace) -> int:
    from oocattn.doctor import examine  # imports Dask, as bench does: not for the commands that need none

    passed = True
    for check in examine():
        print(check, flush=True)
        passed &= check.passed
    return DONE if passed else FAILED


def _bench(options: argparse.Namespace) -> int:
    from oocattn.bench import Progress, bench

    shape = {name: getattr(options, name) for name in ("tokens", "heads", "kv_heads", "head_dim", "dtype")}
    sampling = {name: getattr(options, name) for name in ("repeats", "warm_up", "rows", "seed")}
    choices = {name: getattr(options, name) for name in PLAN_CHOICES}
    with closing(bench(options.folder, causal=not options.full, **shape, **choices, **sampling)) as records:
        for record in records:
            print(record, file=sys.stderr if isinstance(record, Progress) else sys.stdout, flush=True)
    return DONE


def _plan_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("causal", "scale", "dtype", *PLAN_CHOICES)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oocattn",
        description="Exact attention over tensors that do not fit in memory: Q, K and V in Zarr.",
        epilog="Sizes are written 65536, 64K, 1M (binary), 500MB (decimal) or 2GiB. "
        "Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"oocattn {oocattn.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(command=command)
        return added

    _add_synth(add("synth", _synth, "write a dataset of random normal numbers that a seed determines"))
    _add_import(add("import", _import, "copy q, k and v from .npy, .safetensors or .pt files into a dataset"))
    _add_plan(add("plan", _plan, "print what a run would do, and the bytes, memory and seconds it would take"))
    _add_run(add("run", _run, "compute exact attention over a dataset and write out and lse"))
    _add_resume(add("resume", _resume, "go on with an unfinished run, with the plan and dataset that it was begun with"))
    _add_status(add("status", _status, "print how far the run to a result is"))
    _add_verify(add("verify", _verify, "check a result: rows in float64, and all bits; exit 1 if one is wrong"))
    add(
        "doctor", _doctor, "check this machine: kernels against float64, rates, memory, disk, dashboard; exit 1 if one fails"
    )
    _add_bench(add("bench", _bench, "measure this machine, and compare ways to compute the same attention on it"))
    return parser


def _add_synth(parser: argparse.ArgumentParser) -> None:
    _add_new_dataset(parser)
    parser.add_argument("--tokens", type=_size, required=True, metavar="N", help="length of the sequence, like 65536 or 1M")
    parser.add_argument("--heads", type=_size, required=True, metavar="HQ", help="query heads")
    parser.add_argument("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    parser.add_argument("--head-dim", type=_size, required=True, metavar="D", help="head dimension, at most 256")
    parser.add_argument("--dtype", choices=DTYPES, required=True, help="dtype of all three arrays")
    parser.add_argument("--batch", type=_size, default=1, metavar="B", help="batch size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the numbers (default: %(default)s)")
    parser.add_argument("--mean", type=float, default=0.0, help="added to v (default: %(default)s)")


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_new_dataset(parser)
    for name in ("q", "k", "v"):
        parser.add_argument(
            f"--{name}", required=True, metavar="FILE", help=f"file of {name}; FILE.safetensors:TENSOR names a tensor in it"
        )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="bhnd", help="order of the axes in the files (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype in the dataset (default: that of the files)")


def _add_new_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="path of the Zarr group to create")
    parser.add_argument("--overwrite", action="store_true", help="replace the Zarr group if it exists")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_problem_options(parser)
    _add_plan_options(parser)
    parser.add_argument("--draw", metavar="FILE.svg", help="draw which subproblem owns which pair of chunks")


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_problem_options(parser)
    _add_plan_options(parser)
    parser.add_argument("result", metavar="RESULT", help="local path of the Zarr group to create, with arrays out and lse")
    parser.add_argument("--overwrite", action="store_true", help="replace RESULT if it is another run's")
    _add_watching(parser)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path that the run was given")
    _add_watching(parser)


def _add_watching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bar and dashboard address (default: only when standard error is a terminal)",
    )
    parser.add_argument(
        "--timeline",
        metavar="FILE.json",
        help="write when what was busy: a trace for https://ui.perfetto.dev, and a picture beside it, FILE.svg",
    )
    cluster = parser.add_mutually_exclusive_group()
    cluster.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="Dask scheduler to run on (default: this process)")
    cluster.add_argument(
        "--dashboard",
        metavar="HOST:PORT",
        default="127.0.0.1:0",
        help="address of the dashboard; port 0 takes any free one (default: %(default)s)",
    )


def _add_problem_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="path or URL of a Zarr group with arrays q, k and v")
    parser.add_argument("--causal", action="store_true", help="attend no later tokens (default: attend all)")
    parser.add_argument("--scale", type=float, help="factor of the scores (default: 1/sqrt(D))")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of out (default: that of q)")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    half = "default: half of the memory that is free"
    parser.add_argument("--host-memory", type=_size, metavar="SIZE", help=f"hard limit on host memory, like 8GiB ({half})")
    parser.add_argument(
        "--device-memory", type=_size, metavar="SIZE", help=f"hard limit on device memory, like 2GiB ({half})"
    )
    parser.add_argument("--chunks", type=_size, metavar="C", help="number of chunks of tokens (default: the plan decides)")
    parser.add_argument(
        "--decomposition", choices=DECOMPOSITIONS, default="auto", help="how chunk pairs are divided (default: %(default)s)"
    )
    parser.add_argument("--kernel", choices=kernel_names(), help="kernel (default: the best for the dtype)")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path that the run was given")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path of a finished result")
    parser.add_argument("--rows", type=_size, default=64, metavar="R", help="rows to recompute (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of rows (default: %(default)s)")
    parser.add_argument("--dataset", metavar="PATH", help="where the dataset is (default: where it was when it was run)")
    parser.add_argument("--host-memory", type=_size, metavar="SIZE", help="hard limit (default: half of what is free)")
    parser.add_argument(
        "--no-checksums", dest="checksums", action="store_false", help="only rows: do not read all of RESULT"
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=_size, metavar="N", help="length of the sequence (default: 1M; 32K without a GPU)")
    parser.add_argument("--heads", type=_size, metavar="HQ", help="query heads (default: 8; 4 without a GPU)")
    parser.add_argument("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    parser.add_argument("--head-dim", type=_size, default=64, metavar="D", help="head dimension (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of all arrays (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="attend all tokens (default: causal)")
    _add_plan_options(parser)
    parser.add_argument(
        "--folder",
        metavar="DIR",
        default=".",
        help="where the dataset and results are written, and removed at the end (default: the current folder)",
    )
    parser.add_argument("--repeats", type=_size, default=3, metavar="R", help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--no-warm-up", dest="warm_up", action="store_false", help="leave out the untimed round before the timed ones"
    )
    parser.add_argument(
        "--rows", type=_size, default=32, metavar="R", help="rows to compare with float64 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the numbers and rows (default: %(default)s)")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ProblemError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
