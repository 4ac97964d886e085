"""The options of the `oocattn` command. The commands themselves are in `main`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from oocattn.cli.carrying_out import add_engine, add_watching
from oocattn.cli.documents import add_json
from oocattn.cli.exit_codes import explain_exit_codes
from oocattn.cli.inputs import PLACES, add_inputs, add_layout, add_moved_inputs, add_storage_option
from oocattn.cli.parser import Parser
from oocattn.cli.places import add_place, add_scratch
from oocattn.cli.readers import DISK_RATE as _DISK_RATE
from oocattn.cli.readers import DTYPE as _DTYPE
from oocattn.cli.readers import MEAN as _MEAN
from oocattn.cli.readers import SCALE as _SCALE
from oocattn.cli.readers import SEED as _SEED
from oocattn.cli.readers import SOFTCAP as _SOFTCAP
from oocattn.cli.readers import count as _count
from oocattn.cli.readers import duration as _duration
from oocattn.cli.readers import indices as _indices
from oocattn.cli.readers import numbers as _numbers
from oocattn.cli.readers import side as _side
from oocattn.cli.readers import size as _size
from oocattn.cli.readers import span as _span
from oocattn.cli.reporting import DESCRIPTION, add_report
from oocattn.cli.surveying import add_survey
from oocattn.cli.verifying import add_verify
from oocattn.kernels.registry import kernel_names
from oocattn.planning.devices import DEVICES, DISK_RATE
from oocattn.planning.options import DECOMPOSITIONS
from oocattn.problem.arrays import MAX_HEAD_DIM
from oocattn.version import __version__

Command = Callable[[argparse.Namespace], int]  # a command: it takes its options and returns its exit code

PLAN_CHOICES = ("device_memory", "host_memory", "chunks", "decomposition", "kernel", "precise", "checkpoint_interval")
"""Options that change the plan and not the problem."""


def make_parser(commands: Mapping[str, Command], apart: bool = False, ahead: bool = False) -> argparse.ArgumentParser:
    """Make the parser of a command line; it puts the chosen one of `commands` in the option `command`.

    The inputs are a dataset, or tensors `apart`, or for `plan`, `ahead` of them, a shape.
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
        if name == "plan" and ahead:
            add_options = _add_plan_ahead
        elif name in _READING:
            _READING[name](command, apart)
        add_options(command)
        add_json(command)
    return parser


def _add_synth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_new_dataset(parser)
    _add_shape(parser)
    add("--seed", type=_SEED, default=0, help="seed of the random numbers (default: %(default)s)")
    add("--mean", type=_MEAN, default=0.0, help="constant added to v (default: %(default)s)")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """The shape and dtype of a dataset."""
    add = parser.add_argument
    add("--tokens", type=_size, required=True, metavar="N", help="length of the sequence, like 65536 or 1M")
    add("--keys", type=_size, metavar="NK", help="length of k and v (default: that of the sequence)")
    add("--heads", type=_size, required=True, metavar="HQ", help="query heads")
    add("--kv-heads", type=_size, metavar="HKV", help="heads of k and v (default: as many as query heads)")
    add("--head-dim", type=_size, required=True, metavar="D", help=f"head dimension, at most {MAX_HEAD_DIM}")
    add("--value-dim", type=_size, metavar="DV", help="head dimension of v (default: D)")
    add("--dtype", **_DTYPE, required=True, help="dtype of q, k and v")
    add("--batch", type=_size, default=1, metavar="B", help="batch size (default: %(default)s)")


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
    add_layout(add)
    add("--dtype", **_DTYPE, help="dtype of the dataset (default: that of the files)")
    add_storage_option(parser)


def _add_new_dataset(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="path of the Zarr group to create")
    add("--overwrite", action="store_true", help="replace the Zarr group at DATASET")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_problem_options(parser)
    _add_plan_options(parser)
    add_engine(parser)
    _add_plan_printing(parser)


def _add_plan_ahead(parser: argparse.ArgumentParser) -> None:
    """The options of `plan` without a dataset."""
    add = parser.add_argument
    _add_shape(parser)
    add("--device", choices=list(DEVICES), required=True, help="the device, of those whose rates are known; cpu is a core")
    add("--devices", type=_size, default=1, metavar="N", help="how many of them (default: %(default)s)")
    add("--disk-rate", type=_DISK_RATE, default=DISK_RATE, metavar="RATE", help="of the disk, like 6GB/s (default: 1GB/s)")
    add("--causal", action="store_true", help="attend no later keys; the last query is at the last key (default: all keys)")
    _add_mask(parser.add_argument_group("mask"))
    _add_score(parser.add_argument_group("score"), of_dataset=False)
    add("--queries", type=_span, metavar="START:STOP", help="compute these queries alone (default: all)")
    _add_plan_options(parser, of_dataset=False)
    add_engine(parser)
    _add_plan_printing(parser)


def _add_plan_printing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--draw", metavar="FILE.svg", help="draw which subproblem owns which chunk pair")
    add("--budgets", action="store_true", help="show what other budgets and numbers of GPUs would take")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_problem_options(parser)
    _add_plan_options(parser)
    add("result", metavar="RESULT", help="path or URL of the Zarr group to create, with the arrays out and lse")
    add("--overwrite", action="store_true", help="replace RESULT if oocattn wrote it, or restart an unfinished run")
    add_place(parser)
    add_watching(parser)


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
    add_watching(parser)


def _add_problem_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    either = argparse.BooleanOptionalAction
    add("--causal", action=either, help="attend no later keys; the last query is at the last key (default: all keys)")
    omitted = "leave out what the model of a captured layer asked (default: its scale, mask and the like, where not given)"
    add("--no-recorded", dest="recorded", action="store_false", help=omitted)
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


def _add_score(group: argparse._ArgumentGroup, of_dataset: bool = True) -> None:
    add = group.add_argument
    add("--scale", type=_SCALE, help="factor of the scores (default: 1/sqrt(D))")
    add("--softcap", type=_SOFTCAP, metavar="C", help="bound the scores by C tanh(score / C)")
    add("--alibi-slopes", type=_numbers, metavar="ARRAY", help="subtract slope x distance, a slope for each query head")
    if of_dataset:
        add("--no-key-bias", dest="key_bias", action="store_false", help="leave out the array key_bias of DATASET")
    add("--learnable-sink", type=_numbers, metavar="ARRAY", help="one more score, without a value, for each query head")


def _add_plan_options(parser: argparse.ArgumentParser, of_dataset: bool = True) -> None:
    """What changes the plan; without a dataset the table of devices says what there is."""
    add = parser.add_argument
    half = "default: half of the free memory" if of_dataset else "default: half of what such a machine has"
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
    if of_dataset:
        add("--kernel", choices=kernel_names(), help="kernel (default: the fastest that serves the device and dtype)")
    add(
        "--precise",
        action="store_true",
        help="leave out kernels that round softmax weights to 16 bits: slower on GPUs, for reference results",
    )
    add(
        "--checkpoint-interval",
        type=_duration,
        metavar="TIME",
        help="work that a kill may cost (default: 1m); 0 saves only finished chunks of the result",
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="path or URL of the result that the run was given")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="draw it again every second until the run ends: exit code 0 finished, 75 interrupted",
    )
    add_scratch(parser)
    add_storage_option(parser)


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
    "plan": (
        "print the plan of a run: memory, bytes, predicted seconds; without a dataset: plan --tokens N --help",
        _add_plan,
    ),
    "run": ("compute exact attention over a dataset; write out and lse", _add_run),
    "resume": ("continue an unfinished run with its plan and dataset", _add_resume),
    "status": ("print how far a run is; exit code 1 if none has begun, or the certificate failed", _add_status),
    "report": (DESCRIPTION, add_report),
    "verify": (
        "check a result: some rows in float64 or all, and all checksums; exit code 1 if it is wrong, 3 if inconclusive",
        add_verify,
    ),
    "survey": ("add to a result what its rows attend: weights received, entropy, top keys, a map", add_survey),
    "doctor": (
        "check this machine: kernels against float64, rates, memory, disk, dashboard; exit code 1 if a check fails",
        lambda parser: None,
    ),
    "bench": ("measure this machine and compare ways to compute the same attention", _add_bench),
}
"""By name: the description of a command, and the function that adds its options."""

_READING = {
    "plan": add_inputs,
    "run": add_inputs,
    **dict.fromkeys(("resume", "verify", "survey"), add_moved_inputs),
}
"""The commands that read inputs, and the function that adds where these are."""
