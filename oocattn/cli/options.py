"""The options of the `oocattn` command. What the commands do with them is in `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from oocattn import arguments
from oocattn.errors import ProblemError
from oocattn.kernels import kernel_names
from oocattn.planning.options import DECOMPOSITIONS
from oocattn.problem.problem import DTYPES
from oocattn.storage.inputs.axes import LAYOUTS
from oocattn.text import printable
from oocattn.units import parse_duration, parse_size
from oocattn.version import __version__

Command = Callable[[argparse.Namespace], int]
"""What a command does with its options; it returns the exit code."""

PLAN_CHOICES = ("device_memory", "host_memory", "chunks", "decomposition", "kernel", "checkpoint_interval")
"""Options that change the plan and not the problem."""


def make_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of a command line, which puts what is to be done, of these by name, in the option `command`."""
    parser = _Parser(
        prog="oocattn",
        description="Exact attention over tensors that do not fit in memory: Q, K and V in Zarr.",
        epilog="Sizes are written 65536, 64K, 1M (binary), 500MB (decimal) or 2GiB. "
        "Times are written 90, 45s, 10m, 8h or 1h30m. "
        "Exit codes: 0 done, 1 failed, 2 bad usage, 3 inconclusive (verify), 75 time limit reached or SIGUSR1, "
        "129 hung up, 130 interrupted, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"oocattn {__version__}")
    added = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add_options) in _COMMANDS.items():
        command = added.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(command=commands[name])
        add_options(command)
    return parser


def _checked(name: str, check: arguments.Check, read: Callable[[str], object]) -> Callable[[str], Any]:
    """What reads an option's text and checks it as the functions do that take it."""

    def parse(text: str) -> Any:
        try:
            found = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        try:
            return check(name, found)
        except ProblemError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


_DTYPE: dict[str, Any] = {"type": _checked("dtype", arguments.dtype, str), "metavar": f"{{{','.join(DTYPES)}}}"}
_SEED = _checked("seed", arguments.integer(0, arguments.MOST_SEED), int)


class _Parser(argparse.ArgumentParser):
    """A parser whose messages hold what the user typed on one line, fit to print."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _add_synth(parser: argparse.ArgumentParser) -> None:
    _add_new_dataset(parser)
    parser.add_argument("--tokens", type=_size, required=True, metavar="N", help="length of the sequence, like 65536 or 1M")
    parser.add_argument("--heads", type=_size, required=True, metavar="HQ", help="query heads")
    parser.add_argument("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    parser.add_argument("--head-dim", type=_size, required=True, metavar="D", help="head dimension, at most 256")
    parser.add_argument("--dtype", **_DTYPE, required=True, help="dtype of all three arrays")
    parser.add_argument("--batch", type=_size, default=1, metavar="B", help="batch size (default: %(default)s)")
    parser.add_argument("--seed", type=_SEED, default=0, help="seed of the numbers (default: %(default)s)")
    parser.add_argument(
        "--mean", type=_checked("mean", arguments.number(), float), default=0.0, help="added to v (default: %(default)s)"
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_new_dataset(parser)
    for name in ("q", "k", "v"):
        parser.add_argument(
            f"--{name}", required=True, metavar="FILE", help=f"file of {name}; FILE.safetensors:TENSOR names a tensor in it"
        )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="bhnd", help="order of the axes in the files (default: %(default)s)"
    )
    parser.add_argument("--dtype", **_DTYPE, help="dtype in the dataset (default: that of the files)")


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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace RESULT, if oocattn wrote it, or begin an unfinished run again"
    )
    _add_watching(parser)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path that the run was given")
    parser.add_argument("--dataset", metavar="PATH", help="where the dataset is (default: the local path of the run)")
    parser.add_argument(
        "--accept-other-bits",
        action="store_true",
        help="go on also where this processor, GPU or torch rounds differently from the one that began; the report says so",
    )
    parser.add_argument(
        "--check-finished",
        action="store_true",
        help="compare the checksums of all finished chunks first (default: of as many as can be read in 10 s)",
    )
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
        help="record which resource was busy when: a trace for https://ui.perfetto.dev, and a picture beside it, FILE.svg",
    )
    parser.add_argument(
        "--time-limit",
        type=_duration,
        metavar="TIME",
        help="end within this time of the start of the command, with all work saved and exit code 75; resume goes on",
    )
    cluster = parser.add_mutually_exclusive_group()
    cluster.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="Dask scheduler to run on; tried for 30 s (default: this process)"
    )
    cluster.add_argument(
        "--dashboard",
        metavar="HOST:PORT",
        default="127.0.0.1:0",
        help="address of the dashboard; port 0 takes any free one (default: %(default)s)",
    )


def _add_problem_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="path or URL of a Zarr group with arrays q, k and v")
    parser.add_argument("--causal", action="store_true", help="attend no later tokens (default: attend all)")
    scale = _checked("scale", arguments.scale, float)
    parser.add_argument("--scale", type=scale, help="factor of the scores (default: 1/sqrt(D))")
    parser.add_argument("--dtype", **_DTYPE, help="dtype of out (default: that of q)")


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
    parser.add_argument(
        "--checkpoint-interval",
        type=_duration,
        metavar="TIME",
        help="what a kill may cost (default: 1m); 0 saves nothing but finished chunks of the result",
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path that the run was given")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path of a finished result")
    parser.add_argument("--rows", type=_size, default=64, metavar="R", help="rows to recompute (default: %(default)s)")
    parser.add_argument("--seed", type=_SEED, default=0, help="seed of the choice of rows (default: %(default)s)")
    parser.add_argument("--dataset", metavar="PATH", help="where the dataset is (default: where it was when it was run)")
    parser.add_argument(
        "--host-memory", type=_size, metavar="SIZE", help="hard limit on memory (default: half of what is free)"
    )
    parser.add_argument(
        "--no-checksums", dest="checksums", action="store_false", help="only rows: do not read all of RESULT"
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=_size, metavar="N", help="length of the sequence (default: 1M; 32K without a GPU)")
    parser.add_argument("--heads", type=_size, metavar="HQ", help="query heads (default: 8; 4 without a GPU)")
    parser.add_argument("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    parser.add_argument("--head-dim", type=_size, default=64, metavar="D", help="head dimension (default: %(default)s)")
    parser.add_argument("--dtype", **_DTYPE, default="float16", help="dtype of all arrays (default: %(default)s)")
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
    parser.add_argument("--seed", type=_SEED, default=0, help="seed of the numbers and rows (default: %(default)s)")


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ProblemError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ProblemError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "synth": ("write a dataset of random normal numbers that a seed determines", _add_synth),
    "import": ("copy q, k and v from .npy, .safetensors or .pt files into a dataset", _add_import),
    "plan": ("print what a run would do, and the bytes, memory and seconds it would take", _add_plan),
    "run": ("compute exact attention over a dataset and write out and lse", _add_run),
    "resume": ("go on with an unfinished run, with the plan and dataset that it was begun with", _add_resume),
    "status": ("print how far the run to a result is", _add_status),
    "verify": (
        "check a result: some rows in float64, and all checksums; exit 1 if it is wrong, 3 if too many rows show nothing",
        _add_verify,
    ),
    "doctor": (
        "check this machine: kernels against float64, rates, memory, disk, dashboard; exit 1 if one fails",
        lambda parser: None,
    ),
    "bench": ("measure this machine, and compare ways to compute the same attention on it", _add_bench),
}
"""What each command is for, and what adds its options."""
