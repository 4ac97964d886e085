"""Recording what the attention layers of a transformers model get, as datasets, while the model runs.

Every attention function of the library is wrapped while a recording is open; the model and its configuration stay as they
are. A layer whose keys grow with each call, in a cache, has its new tokens appended.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from oocattn.errors import ProblemError
from oocattn.storage.inputs.axes import BHND
from oocattn.storage.inputs.memory import open_memory
from oocattn.storage.make.create import create_array, create_dataset, dimension_names, fill_array

EAGER = "eager"
"""The implementation that each model has of its own."""

logger = logging.getLogger("oocattn")

_open: list[Capture] = []
_changing = threading.RLock()


def capture(
    model: torch.nn.Module, path: str | Path, layers: Sequence[int] | None = None, *, overwrite: bool = False
) -> Capture:
    """Record q, k and v of a model's attention layers, after positions were applied, in a Zarr group at `path`.

    `model` is one of transformers, of any attention implementation. From this call on each of `layers` (default: all)
    writes a dataset `layer-INDEX` as it runs: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D], with the factor of its scores as
    attribute `scale`. Where keys are cached, later calls append to it. End it with `close()`, or as a context manager:

        with capture(model, "store.zarr", layers=[0, 1]):
            model(ids)
        oocattn.attention("store.zarr/layer-0", "out.zarr", causal=True)

    Raises ProblemError for layers that the model does not have, and ResultExistsError where something is at `path`, unless
    it is a Zarr group and `overwrite` is given.
    """
    modules = {module: name for name, module in model.named_modules() if isinstance(_index(module), int)}
    found = sorted({_index(module) for module in modules})
    if not found or set(layers or ()) - set(found):
        asked = "all" if layers is None else list(layers)
        raise ProblemError(
            f"layers = {asked}: {type(model).__name__} has the layers {found}, by the attribute layer_idx of its modules; "
            "name some of them"
        )
    with create_dataset(path, attributes={"model": type(model).__name__}, overwrite=overwrite):
        pass  # layers come to be in it
    chosen = {module: name for module, name in modules.items() if layers is None or _index(module) in layers}
    return Capture(chosen, str(path))


class Capture:
    """A recording, open until it is closed; see `capture`."""

    def __init__(self, modules: dict[torch.nn.Module, str], path: str) -> None:
        self._modules = modules
        self._path = path
        self._names: dict[torch.nn.Module, str] = {}
        with _changing:
            if not _open:
                _wrap()
            _open.append(self)

    def close(self) -> None:
        """End the recording."""
        with _changing:
            if self not in _open:
                return
            _open.remove(self)
            if not _open:
                _unwrap()
        if not self._names:
            logger.warning(
                "%s is empty: none of its layers ran while the recording was open; run the model in between", self._path
            )

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, module: torch.nn.Module, tensors: dict[str, torch.Tensor], scaling: float | None) -> None:
        """Write what a layer got, q, k and v [B, H, N, D], or append it to what it got before."""
        if module in self._names:
            self._append(self._names[module], tensors)
        elif module in self._modules:
            name = f"layer-{_index(module)}"
            if name in self._names.values():
                name = self._modules[module]
            self._create(name, tensors, scaling)
            self._names[module] = name

    def _create(self, name: str, tensors: dict[str, torch.Tensor], scaling: float | None) -> None:
        dimensions = dimension_names({part: tuple(tensor.shape) for part, tensor in tensors.items()})
        with create_dataset(f"{self._path}/{name}", attributes={} if scaling is None else {"scale": scaling}) as group:
            for part, tensor in tensors.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                array = create_array(group, part, tuple(tensor.shape), dtype, dimensions=dimensions[part])
                fill_array(array, _Rows(part, tensor))

    def _append(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        group = zarr.open_group(f"{self._path}/{name}", mode="r+")
        before, new = group["k"].shape[2], tensors["q"].shape[2]  # type: ignore[union-attr]
        if tensors["k"].shape[2] != before + new:
            raise ProblemError(
                f"{name} in {self._path} has {before:,} keys, and its layer ran again with {tensors['k'].shape[2]:,}, of "
                f"which {new:,} are new: expected one pass, or a cache that grows; record each pass in a store of its own"
            )
        for part, tensor in tensors.items():
            array: Any = group[part]
            start, rows = array.shape[2], _Rows(part, tensor[:, :, -new:])
            array.resize((*array.shape[:2], start + new, array.shape[3]))
            for batch, head in np.ndindex(*array.shape[:2]):
                array[batch, head, start:] = rows(batch, head, 0, new)


class _Rows:
    """The rows of a tensor, wherever it lies, for `fill_array`."""

    def __init__(self, part: str, tensor: torch.Tensor) -> None:
        opened = open_memory(part, tensor.detach())
        assert opened is not None
        self._source = opened.source(part, BHND)

    def __call__(self, batch: int, head: int, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self._source.row_shape), self._source.dtype)
        self._source.read_rows(batch, head, start, stop, out)
        return out


@dataclass(frozen=True)
class _Recorder:
    """An attention function of transformers that has recordings made first. `own` is what a caller had put in its place."""

    name: str
    own: Callable[..., Any] | None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        for recording in tuple(_open):
            recording.record(module, {"q": query, "k": key, "v": value}, options.get("scaling"))
        function = self.own or AttentionInterface._global_mapping.get(self.name)
        if function is None:
            function = sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, *rest, **options)


def _wrap() -> None:
    """Put a recorder in the place of every attention function."""
    own = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name in {*ALL_ATTENTION_FUNCTIONS.keys(), EAGER}:
        ALL_ATTENTION_FUNCTIONS[name] = _Recorder(name, own.get(name))


def _unwrap() -> None:
    """Undo `_wrap`."""
    for name, function in list(ALL_ATTENTION_FUNCTIONS._local_mapping.items()):
        if isinstance(function, _Recorder):
            del ALL_ATTENTION_FUNCTIONS[name]
            if function.own is not None:
                ALL_ATTENTION_FUNCTIONS[name] = function.own


def _index(module: torch.nn.Module) -> Any:
    """The index of the layer that a module belongs to; None of others."""
    return getattr(module, "layer_idx", None)
