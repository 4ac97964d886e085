"""The inputs of a command: DATASET, or the tensors one by one in its place."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import oocattn
from oocattn.errors import ProblemError
from oocattn.records import parse_value
from oocattn.storage.inputs.axes import LAYOUTS, PACKED_LAYOUTS

TENSORS = ("q", "k", "v", "qkv")

PLACES = "path or URL of a Zarr array, FILE.npy, FILE.safetensors:TENSOR or FILE.pt:TENSOR"
"""Where a tensor may be."""


def are_apart(arguments: Sequence[str]) -> bool:
    """Whether a command line names tensors one by one, in place of DATASET; argparse cannot find that out by itself."""
    return any(each.partition("=")[0] in {f"--{name}" for name in TENSORS} for each in arguments)


def are_ahead(arguments: Sequence[str]) -> bool:
    """Whether a command line of `plan` gives the shape of a dataset, in place of one."""
    return arguments[:1] == ["plan"] and any(each.partition("=")[0] == "--tokens" for each in arguments)


def add_inputs(parser: argparse.ArgumentParser, apart: bool) -> None:
    """Add what says where the inputs of a run are."""
    if not apart:
        parser.add_argument("dataset", metavar="DATASET", help="path or URL of a Zarr group with the arrays q, k and v")
    _add_tensors(parser.add_argument_group("tensors one by one, in place of DATASET"))
    add_storage_option(parser)


def add_moved_inputs(parser: argparse.ArgumentParser, apart: bool) -> None:
    """Add what says where the inputs of a run are now."""
    parser.add_argument("--dataset", metavar="PATH", help="path or URL of the dataset (default: the recorded local path)")
    _add_tensors(parser.add_argument_group("tensors one by one, in place of --dataset"))
    add_storage_option(parser)


def _add_tensors(group: argparse._ArgumentGroup) -> None:
    for name in ("q", "k", "v"):
        group.add_argument(f"--{name}", metavar="FILE", help=f"where {name} is: {PLACES}")
    group.add_argument("--qkv", metavar="FILE", help="where all three are, in one tensor")
    group.add_argument(
        "--key-bias", dest="bias", metavar="FILE", help="where a number for each key is, [B, H, N], [H, N] or [N]"
    )
    add_layout(group.add_argument, *PACKED_LAYOUTS)
    group.add_argument("--qkv-heads", type=_heads, metavar="HQ,HKV", help="heads of q and of k, where --layout has f")


def add_layout(add: Callable[..., Any], *more: str) -> None:
    """Add the order of the axes of tensors; `more` are those of packed ones, where there may be any."""
    packed = f"; of --qkv {', '.join(more)}, with f for all features" if more else ""
    add(
        "--layout",
        type=partial(_layout, (*LAYOUTS, *more)),
        metavar="LAYOUT",
        help="order of the axes of tensors whose dimensions have no names: b batch, h heads, n tokens, d head dimension, "
        f"{', '.join(LAYOUTS)}{packed}; where tensors differ, q=bnhd,k=bhnd (default: the first of these)",
    )


def _layout(known: Sequence[str], text: str) -> str | dict[str, str]:
    """The order of axes for all tensors, or of each."""
    parts = [each.partition("=")[::2] for each in text.split(",")] if "=" in text else [("", text)]
    found = dict(parts)
    for name, order in parts:
        if name not in ("", *TENSORS) or order not in known or len(found) < len(parts):
            raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(known)}, or such as q=bnhd,k=bhnd")
    return found.get("", found)


def _heads(text: str) -> tuple[int, int]:
    """Numbers of heads of q, and of k and v; one number is both."""
    heads, comma, kv_heads = text.partition(",")
    try:
        found = int(heads), int(kv_heads if comma else heads)
    except ValueError:
        found = (0, 0)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HQ,HKV or one number for both, each at least 1")
    return found


def add_storage_option(parser: argparse.ArgumentParser) -> None:
    """Add the options of stores behind URLs."""
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        type=_storage_option,
        metavar="KEY=VALUE",
        help="option of fsspec for the stores behind URLs, like anon=true; VALUE is JSON, or else a text; may be repeated",
    )


def _storage_option(text: str) -> tuple[str, Any]:
    """Key and value. The error shows neither: it may be a password."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError("expected KEY=VALUE")
    try:
        return key, parse_value(value)
    except ValueError:
        return key, value


def given_storage_options(options: argparse.Namespace) -> dict[str, Any] | None:
    """The options for stores behind URLs; None where none are given. Raises ProblemError for one that is given twice."""
    found: dict[str, Any] = {}
    for key, value in options.storage_option:
        if key in found:
            raise ProblemError(f"--storage-option {key} is given twice: expected one value")
        found[key] = value
    return found or None


def given_inputs(options: argparse.Namespace) -> str | oocattn.Inputs:
    """The inputs of a new run."""
    tensors = named_tensors(options)
    if tensors is not None:
        return tensors
    dataset: str = options.dataset
    return dataset


def moved_inputs(options: argparse.Namespace) -> str | oocattn.Inputs | None:
    """Where the inputs of a run are now; None where they are not named."""
    dataset: str | None = options.dataset
    tensors = named_tensors(options)
    return dataset if tensors is None else tensors


def named_tensors(options: argparse.Namespace) -> oocattn.Inputs | None:
    """The tensors that are named one by one; None where none are. What goes with them is refused by itself."""
    if all(getattr(options, name) is None for name in TENSORS):
        for name in ("bias", "layout", "qkv_heads"):
            if getattr(options, name) is not None:
                option = "--key-bias" if name == "bias" else f"--{name.replace('_', '-')}"
                raise ProblemError(
                    f"{option} with a dataset: expected it with tensors that are named one by one (--q --k --v)"
                )
        return None
    dataset = getattr(options, "dataset", None)
    if dataset is not None:
        raise ProblemError(f"--dataset {dataset}, and tensors one by one: name either where the inputs are")
    heads, kv_heads = options.qkv_heads or (0, 0)
    return oocattn.Inputs(options.q, options.k, options.v, options.bias, options.qkv, options.layout, heads, kv_heads)
