"""The options of the `oocattn` command. The commands themselves are in `main`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from oocattn import arguments
from oocattn.cli.documents import add_json
from oocattn.cli.exit_codes import explain_exit_codes
from oocattn.cli.inputs import PLACES, add_inputs, add_moved_inputs, add_storage_option
from oocattn.cli.parser import Parser
from oocattn.cli.places import add_place, add_scratch
from oocattn.errors import ProblemError
from oocattn.kernels.registry import kernel_names
from oocattn.pipelines.engines import ENGINES
from oocattn.planning.options import DECOMPOSITIONS
from oocattn.problem.arrays import DTYPES, MAX_HEAD_DIM
from oocattn.problem_arguments import softcap
from oocattn.storage.inputs.axes import LAYOUTS
from oocattn.units import parse_duration, parse_size
from oocattn.version import __version__

Command = Callable[[argparse.Namespace], int]  # a command: it takes its options and returns its exit code

PLAN_CHOICES = ("device_memory", "host_memory", "chunks", "decomposition", "kernel", "checkpoint_interval")
"""Options that change the plan and not the problem."""


def make_parser(commands: Mapping[str, Command], apart: bool = False) -> argparse.ArgumentParser:
    """Make the parser of a command line; it puts the chosen one of `commands` in the option `command`.

    The inputs are a dataset, or tensors `apart`.
    """
    parser = Parser(
        prog="oocattn",
        description="Compute exact attention over Q, K and V in Zarr arrays that may be larger than memory.",
        epilog="Sizes are written 65536, 64K, 1M (binary), 500MB (decimal) or 2GiB. "
        "Times are written 90, 45s, 10m, 8h or 1h30m. "
        f"{explain_exit_codes()}",
    )
    parser.add_argument("--version", action="version", version=f"oocattn {__version__}")
    added = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add_options) in _COMMANDS.items():
        command = added.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=explain_exit_codes()
        )
        command.set_defaults(command=commands[name], parser=command)
        if name in _READING:
            _READING[name](command, apart)
        add_options(command)
        add_json(command)
    return parser


def _reader(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a function that reads an option's text, for argparse, and checks it as the Python functions do."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ProblemError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

    return read


def _parse_count(text: str) -> int:
    if text.strip().startswith("-"):
        raise ProblemError(f"{text!r}: expected a whole number of at least 0")
    return 0 if text.strip() == "0" else parse_size(text)


def _parse_side(text: str) -> int | None:
    return None if text in ("-1", "none") else _parse_count(text)


def _parse_span(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start and stop):
        raise arguments.refused("", text, "START:STOP")
    return _parse_count(start), _parse_count(stop)


def _parse_indices(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise arguments.refused("", text, "whole numbers, H,H,...") from None


def _parse_numbers(text: str) -> list[float] | str:
    """Numbers between commas; any other text is the path of a file or the name of an array."""
    try:
        return [int(each) if each.strip().lstrip("+-").isdecimal() else float(each) for each in text.split(",")]
    except ValueError:
        return text


_size, _duration = _reader(parse_size), _reader(parse_duration)
_count, _side = _reader(_parse_count), _reader(_parse_side)
_span, _indices, _numbers = _reader(_parse_span), _reader(_parse_indices), _reader(_parse_numbers)
_DTYPE: dict[str, Any] = {"type": _reader(partial(arguments.dtype, "")), "metavar": f"{{{','.join(DTYPES)}}}"}
_SEED = _reader(lambda text: arguments.integer(0, arguments.MOST_SEED)("", int(text)))
_SCALE = _reader(lambda text: arguments.scale("", float(text)))
_SOFTCAP = _reader(lambda text: softcap("", float(text)))
_MEAN = _reader(lambda text: arguments.number()("", float(text)))


def _add_synth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_new_dataset(parser)
    add("--tokens", type=_size, required=True, metavar="N", help="length of the sequence, like 65536 or 1M")
    add("--keys", type=_size, metavar="NK", help="length of k and v (default: that of the sequence)")
    add("--heads", type=_size, required=True, metavar="HQ", help="query heads")
    add("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    add("--head-dim", type=_size, required=True, metavar="D", help=f"head dimension, at most {MAX_HEAD_DIM}")
    add("--value-dim", type=_size, metavar="DV", help="head dimension of v (default: D)")
    add("--dtype", **_DTYPE, required=True, help="dtype of q, k and v")
    add("--batch", type=_size, default=1, metavar="B", help="batch size (default: %(default)s)")
    add("--seed", type=_SEED, default=0, help="seed of the random numbers (default: %(default)s)")
    add("--mean", type=_MEAN, default=0.0, help="constant added to v (default: %(default)s)")


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_new_dataset(parser)
    for name in ("q", "k", "v"):
        add(
            f"--{name}",
            required=True,
            metavar="FILE",
            help=f"where {name} is: {PLACES}",
        )
    add("--key-bias", metavar="FILE", help="file of a number that each key adds to its scores, [B, H, N], [H, N] or [N]")
    add("--layout", choices=LAYOUTS, help="order of the axes of q, k and v (default: by their dimension names, or bhnd)")
    add("--dtype", **_DTYPE, help="dtype of the dataset (default: that of the files)")
    add_storage_option(parser)


def _add_new_dataset(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="path of the Zarr group to create")
    add("--overwrite", action="store_true", help="replace the Zarr group at DATASET")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_problem_options(parser)
    _add_plan_options(parser)
    _add_engine(parser)
    parser.add_argument("--draw", metavar="FILE.svg", help="draw which subproblem owns which chunk pair")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_problem_options(parser)
    _add_plan_options(parser)
    add("result", metavar="RESULT", help="path or URL of the Zarr group to create, with the arrays out and lse")
    add("--overwrite", action="store_true", help="replace RESULT if oocattn wrote it, or restart an unfinished run")
    add_place(parser)
    _add_watching(parser)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("result", metavar="RESULT", help="path or URL of the result that the run was given")
    add(
        "--accept-other-bits",
        action="store_true",
        help="continue even if this processor, GPU or torch rounds differently; the report says so",
    )
    add(
        "--check-finished",
        action="store_true",
        help="compare the checksums of all finished chunks first (default: for 10 s)",
    )
    add_place(parser)
    _add_watching(parser)


def _add_watching(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a progress bar and the dashboard address (default: only if standard error is a terminal)",
    )
    add(
        "--timeline",
        metavar="FILE.json",
        help="record which resource was busy when: FILE.json for https://ui.perfetto.dev, and a picture, FILE.svg",
    )
    add(
        "--time-limit",
        type=_duration,
        metavar="TIME",
        help="end before this time has passed since the start of the command, with all work saved and exit code 75",
    )
    _add_engine(parser)
    cluster = parser.add_mutually_exclusive_group()
    cluster.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Dask scheduler to run on, tried for 30 s (default: workers in this process)",
    )
    cluster.add_argument(
        "--dashboard",
        metavar="HOST:PORT",
        default="127.0.0.1:0",
        help="address of the dashboard; port 0 is any free port (default: %(default)s)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="dask",
        help="what runs the tasks: Dask, or threads of this process alone (default: %(default)s)",
    )


def _add_problem_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--causal", action="store_true", help="attend no later keys; the last query is at the last key (default: all keys)")
    add("--dtype", **_DTYPE, help="dtype of out (default: that of q)")
    _add_mask(parser.add_argument_group("mask"))
    _add_score(parser.add_argument_group("score"))
    part = parser.add_argument_group("part of the rows")
    part.add_argument("--queries", type=_span, metavar="START:STOP", help="compute these queries alone (default: all)")
    part.add_argument("--heads", type=_indices, metavar="H,H,...", help="compute these query heads alone (default: all)")


def _add_mask(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--window-size",
        nargs=2,
        type=_side,
        metavar=("LEFT", "RIGHT"),
        help="attend so many keys before and after a query's own; -1 or none: no bound",
    )
    array = "numbers 0,10,20, FILE.npy, or the NAME of an array in DATASET"
    add("--cu-seqlens-q", type=_numbers, metavar="ARRAY", help=f"boundaries of packed documents among the queries: {array}")
    add("--cu-seqlens-k", type=_numbers, metavar="ARRAY", help="the same among the keys (default: as --cu-seqlens-q)")
    add("--seqused-k", type=_numbers, metavar="ARRAY", help="keys that exist, for each batch entry")
    add("--prefix", type=_count, default=0, metavar="P", help="let all queries of a document attend its first P keys")
    add("--sink-tokens", type=_count, default=0, metavar="S", help="exempt the first S keys of a document from the window")


def _add_score(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--scale", type=_SCALE, help="factor of the scores (default: 1/sqrt(D))")
    add("--softcap", type=_SOFTCAP, metavar="C", help="bound the scores by C tanh(score / C)")
    add("--alibi-slopes", type=_numbers, metavar="ARRAY", help="subtract slope x distance, a slope for each query head")
    add("--no-key-bias", dest="key_bias", action="store_false", help="leave out the array key_bias of DATASET")
    add("--learnable-sink", type=_numbers, metavar="ARRAY", help="one more score, without a value, for each query head")


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    half = "default: half of the free memory"
    add("--host-memory", type=_size, metavar="SIZE", help=f"hard limit on host memory, like 8GiB ({half})")
    add("--device-memory", type=_size, metavar="SIZE", help=f"hard limit on device memory, like 2GiB ({half})")
    add(
        "--chunks", type=_size, metavar="C", help="number of chunks that the tokens are cut into (default: the plan decides)"
    )
    add(
        "--decomposition",
        choices=DECOMPOSITIONS,
        default="auto",
        help="division of the chunk pairs: cyclic quorums (cqs) or strips (default: %(default)s)",
    )
    add("--kernel", choices=kernel_names(), help="kernel (default: the fastest that serves the device and dtype)")
    add(
        "--checkpoint-interval",
        type=_duration,
        metavar="TIME",
        help="work that a kill may cost (default: 1m); 0 saves only finished chunks of the result",
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path or URL of the result that the run was given")
    add_scratch(parser)
    add_storage_option(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("result", metavar="RESULT", help="path or URL of a finished result")
    add("--rows", type=_size, default=64, metavar="R", help="number of rows to recompute (default: %(default)s)")
    add("--seed", type=_SEED, default=0, help="seed of the random rows (default: %(default)s)")
    add("--host-memory", type=_size, metavar="SIZE", help="hard limit on host memory (default: half of the free memory)")
    add("--no-checksums", dest="checksums", action="store_false", help="check rows only; do not compare checksums")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=_size, metavar="N", help="length of the sequence (default: 1M; 32K without a GPU)")
    add("--heads", type=_size, metavar="HQ", help="query heads (default: 8; 4 without a GPU)")
    add("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    add("--keys", type=_size, metavar="NK", help="tokens of k and v (default: as many as of q)")
    add("--head-dim", type=_size, default=64, metavar="D", help="head dimension (default: %(default)s)")
    add("--value-dim", type=_size, metavar="DV", help="head dimension of v and out (default: that of q)")
    add("--dtype", **_DTYPE, default="float16", help="dtype of all arrays (default: %(default)s)")
    add("--full", action="store_true", help="let each token attend all tokens (default: causal)")
    add("--queries", type=_span, metavar="START:STOP", help="compute these queries alone (default: all)")
    _add_mask(parser.add_argument_group("mask"))
    _add_score(parser.add_argument_group("score"))
    _add_plan_options(parser)
    add(
        "--folder",
        metavar="DIR",
        default=".",
        help="folder for the dataset and the results, which are removed at the end (default: the current folder)",
    )
    add("--repeats", type=_size, default=3, metavar="R", help="timed rounds (default: %(default)s)")
    add("--no-warm-up", dest="warm_up", action="store_false", help="skip the untimed round before the timed ones")
    add("--rows", type=_size, default=32, metavar="R", help="number of rows to compare with float64 (default: %(default)s)")
    add("--seed", type=_SEED, default=0, help="seed of the random numbers and rows (default: %(default)s)")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "synth": ("write a dataset of random normal numbers", _add_synth),
    "import": ("copy q, k and v from .npy, .safetensors or .pt files into a dataset", _add_import),
    "plan": ("print the plan of a run: memory, bytes, predicted seconds", _add_plan),
    "run": ("compute exact attention over a dataset; write out and lse", _add_run),
    "resume": ("continue an unfinished run with its plan and dataset", _add_resume),
    "status": ("print how far a run is", _add_status),
    "verify": (
        "check a result: sampled rows in float64, all checksums; exit code 1 if it is wrong, 3 if inconclusive",
        _add_verify,
    ),
    "doctor": (
        "check this machine: kernels against float64, rates, memory, disk, dashboard; exit code 1 if a check fails",
        lambda parser: None,
    ),
    "bench": ("measure this machine and compare ways to compute the same attention", _add_bench),
}
"""By name: the description of a command, and the function that adds its options."""

_READING = {"plan": add_inputs, "run": add_inputs, "resume": add_moved_inputs, "verify": add_moved_inputs}
"""The commands that read inputs, and the function that adds where these are."""
