"""The inputs of a run as a caller names them: a group, or q, k and v one by one, each wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import zarr

from oocattn import naming
from oocattn.arguments import integer
from oocattn.errors import IntegrityError, ProblemError
from oocattn.problem.arrays import KEY_BIAS
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.axes import LAYOUTS, PACKED_LAYOUTS, Axes, packed_axes, plain_axes
from oocattn.storage.inputs.dask_arrays import open_dask
from oocattn.storage.inputs.data_arrays import open_data_array
from oocattn.storage.inputs.dataset import Dataset, check_poses
from oocattn.storage.inputs.file_source import open_file
from oocattn.storage.inputs.layouts import LayoutLike, agreed_layouts
from oocattn.storage.inputs.meaning import order_by_names
from oocattn.storage.inputs.memmap import open_memmap, open_raw
from oocattn.storage.inputs.memory import open_memory
from oocattn.storage.inputs.origin import Origin
from oocattn.storage.inputs.source import Opened, TensorSource
from oocattn.storage.inputs.strangers import remedy_for
from oocattn.storage.inputs.zarr_nodes import open_zarr_array
from oocattn.storage.locations import Location, describe, parse_location, recorded_location
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.zarr_compat import Store

if TYPE_CHECKING:
    import dask.array
    import numpy as np
    import torch
    import xarray

Tensor: TypeAlias = (
    "str | Path | np.ndarray[Any, Any] | torch.Tensor | zarr.Array[Any] | dask.array.Array | xarray.DataArray"
)
"""A tensor as callers give it."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a problem, each wherever it lies: q, k and v, or all three in `qkv`; and `key_bias`.

    Each is the path or URL of a Zarr array, a `zarr.Array` of any store, `FILE.npy`, `FILE.safetensors:NAME` (also
    `FILE.safetensors.index.json:NAME`), `FILE.pt:NAME`, or an array of NumPy (`numpy.memmap` too), PyTorch, Dask or xarray.

    `layout` is the order of their axes: one of "bhnd", "bnhd", "hnd" and "nhd", or for `qkv` "bn3hd", "n3hd", or "bnf" and
    "nf" for features [(Hq + 2 Hkv) D], which take `heads` and `kv_heads`. Tensors of different orders have a mapping, such
    as {"q": "bnhd", "k": "bhnd"}. Of a tensor whose dimensions have names these decide; of one without either it is "bhnd",
    or "bn3hd".
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    key_bias: Tensor | None = None
    qkv: Tensor | None = None
    layout: LayoutLike = None
    heads: int = 0
    kv_heads: int = 0


InputsLike: TypeAlias = "str | Path | Location | zarr.Group | Store | Mapping[str, Tensor] | Inputs"
"""The inputs of a run as callers give them."""


Opener = Callable[[str, object, StorageOptions | None], Opened | None]
"""(name, what the caller gave, options of stores behind URLs) to the open tensor; None for what is of another kind.

Raises ProblemError."""

KINDS: tuple[Opener, ...] = (open_memmap, open_memory, open_dask, open_data_array, open_file, open_zarr_array)
"""The kinds of tensors, in the order in which they are tried. To add one: a class of `TensorSource`, and its opener here."""

ACCEPTED = (
    "the path or URL of a Zarr array, a zarr.Array, FILE.npy, FILE.safetensors:TENSOR, FILE.pt:TENSOR, or an array of "
    "NumPy, PyTorch, Dask or xarray"
)
"""What a tensor may be, for messages."""


def open_inputs(
    inputs: InputsLike, *, key_bias: bool = True, recorded: bool = False, storage_options: StorageOptions | None = None
) -> Dataset:
    """Open the inputs of a run. What they are and raise without `key_bias`, and with `recorded`: see `Dataset.open`."""
    parsed = parse_inputs(inputs)
    if isinstance(parsed, Inputs):
        return _open_tensors(parsed, key_bias, storage_options)
    return Dataset.open(parsed, key_bias=key_bias, recorded=recorded, storage_options=storage_options)


def parse_inputs(inputs: InputsLike) -> Inputs | Location | zarr.Group | Store:
    """What a caller means by inputs; nothing is opened. Raises ProblemError for what is neither a place nor tensors."""
    if isinstance(inputs, Inputs | Location | zarr.Group | Store):
        return inputs
    if isinstance(inputs, Mapping):
        return _from_mapping(inputs)
    if isinstance(inputs, str | PathLike):
        return parse_location(inputs)
    raise ProblemError(
        f"inputs: found {describe(inputs)}, expected the path or URL of a Zarr group, a zarr.Group, a mapping "
        '{"q": ..., "k": ..., "v": ...}, or oocattn.Inputs(q=..., k=..., v=...)'
        f"{remedy_for(inputs) if isinstance(inputs, bytes | bytearray) else ''}"
    )


def open_recorded(
    location: object,
    origins: Mapping[str, Origin],
    named: InputsLike | None,
    *,
    key_bias: bool = True,
    storage_options: StorageOptions | None = None,
) -> Dataset:
    """Open the inputs of a result or journal: those that are `named`, else the recorded ones, where these are local.

    Raises IntegrityError where they are not, and as `open_inputs`.
    """
    if named is not None:
        return open_inputs(named, key_bias=key_bias, storage_options=storage_options)
    for name, origin in origins.items():
        if not origin.location:
            raise IntegrityError(
                f"{name} was {origin}, and its numbers are not recorded: give the same again with {naming.named('inputs')} "
                "(or, if they are in files now, begin again from these)"
            )
    places = {name: recorded_location(origin.location) for name, origin in origins.items()}
    try:
        if origins:
            return Dataset.of({name: _open_origin(name, places[name], origin) for name, origin in origins.items()})
        return Dataset.open(recorded_location(location), key_bias=key_bias)
    except ProblemError as error:
        raise ProblemError(f"{error}; if it was moved, say where with {naming.named('inputs')}") from error


def open_again(
    place: RecordedInputs, problem: Problem, whose: str, named: InputsLike | None, storage_options: StorageOptions | None
) -> Dataset:
    """Open the inputs of a "run" or a "result" (`whose`), as `open_recorded`, and check that they pose its problem."""
    biased = bool(problem.bias_heads)
    opened = open_recorded(place.location, place.tensors, named, key_bias=biased, storage_options=storage_options)
    check_poses(opened, problem, whose)
    return opened


class RecordedInputs(Protocol):
    """Where the inputs of a run or a result were."""

    @property
    def location(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, Origin]: ...


def _open_origin(name: str, place: Location, origin: Origin) -> TensorSource:
    """The tensor of a record, at its local path. Raises IntegrityError where it has other axes now."""
    if origin.numbers is not None:
        return open_raw(name, origin, Path(str(place)))
    found = open_tensor(name, f"{place}:{origin.tensor}" if origin.tensor else str(place))
    if len(found.shape) != len(origin.axes.order):
        raise IntegrityError(
            f"{name} ({found.label}) has shape {list(found.shape)} now: expected the axes {origin.axes.order}, as the run "
            f"read it; if it was moved, say where with {naming.named('inputs')}"
        )
    return found.source(name, origin.axes)


def open_tensor(name: str, typed: object, storage_options: StorageOptions | None = None) -> Opened:
    """Open a tensor of any kind. Raises ProblemError."""
    for opener in KINDS:
        if (found := opener(name, typed, storage_options)) is not None:
            return found
    raise ProblemError(f"{name}: found {describe(typed)}, expected {ACCEPTED}{remedy_for(typed)}")


def _from_mapping(given: Mapping[str, Any]) -> Inputs:
    known = [each.name for each in fields(Inputs)]
    if unknown := [str(name) for name in given if name not in known]:
        raise ProblemError(f"the inputs have the key {unknown[0]!r:.80}: expected {', '.join(known)}")
    return Inputs(**given)


def check_named(inputs: Inputs) -> None:
    """Raise ProblemError where tensors are missing, or named twice. Nothing is opened."""
    named, counts = naming.named, naming.by_face("heads and kv_heads are", "--qkv-heads is")
    given = [name for name in ("q", "k", "v") if getattr(inputs, name) is not None]
    if inputs.qkv is not None:
        if given:
            raise ProblemError(
                f"the inputs have {named('qkv')}, and {named(given[0])}: expected one tensor for all, or q, k and v"
            )
        return
    if missing := [named(name) for name in ("q", "k", "v") if name not in given]:
        expected = naming.by_face("q, k and v, or qkv", "--q, --k and --v, or --qkv")
        raise ProblemError(f"the inputs have no {' and no '.join(missing)}: expected {expected}")
    if any(_counts_of_heads(inputs)):
        raise ProblemError(f"{counts} given for q, k and v apart: expected with {named('qkv')} alone")


def _open_tensors(inputs: Inputs, key_bias: bool, storage_options: StorageOptions | None) -> Dataset:
    check_named(inputs)
    opened = {
        name: open_tensor(name, typed, storage_options)
        for name in ("q", "k", "v", "qkv", KEY_BIAS)
        if (typed := getattr(inputs, name)) is not None and (key_bias or name != KEY_BIAS)
    }
    bias = opened.pop(KEY_BIAS, None)
    sources = _packed(inputs, opened) if "qkv" in opened else _apart(inputs, opened)
    if bias is not None:
        sources[KEY_BIAS] = bias_source(bias)
    return Dataset.of(sources)


def bias_source(found: Opened) -> TensorSource:
    """The source of a key bias: [B, H, N], [H, N] or [N]."""
    if not 1 <= len(found.shape) <= 3:
        raise ProblemError(
            f"{KEY_BIAS} ({found.label}) has shape {list(found.shape)}: expected [B, H, N], [H, N] or [N], a number for "
            "each key"
        )
    named = order_by_names(KEY_BIAS, f"{KEY_BIAS} ({found.label})", found.names)
    return found.source(KEY_BIAS, Axes(named or "bhn"[-len(found.shape) :]))


def _apart(inputs: Inputs, opened: Mapping[str, Opened]) -> dict[str, TensorSource]:
    return plain_sources(opened, inputs.layout)


def plain_sources(opened: Mapping[str, Opened], layout: LayoutLike) -> dict[str, TensorSource]:
    """The sources of q, k and v: axes are as dimensions are called, as `layout` says, or [B, H, N, D]."""
    orders = agreed_layouts(opened, layout, LAYOUTS)
    return {
        name: found.source(name, plain_axes(name, orders[name], found.shape, found.label)) for name, found in opened.items()
    }


def _packed(inputs: Inputs, opened: Mapping[str, Opened]) -> dict[str, TensorSource]:
    found = opened["qkv"]
    layout = agreed_layouts(opened, inputs.layout, PACKED_LAYOUTS)["qkv"]
    heads, kv_heads = _counts_of_heads(inputs)
    if (heads or kv_heads) and "f" not in layout:
        counts = naming.by_face("heads and kv_heads are", "--qkv-heads is")
        raise ProblemError(f"{counts} given with layout {layout}: expected with layouts bnf and nf alone")
    axes = packed_axes(layout, found.shape, heads, kv_heads, found.label)
    return {name: found.source(name, own) for name, own in axes.items()}


def _counts_of_heads(inputs: Inputs) -> tuple[int, int]:
    return integer(0)("heads", inputs.heads), integer(0)("kv_heads", inputs.kv_heads)
