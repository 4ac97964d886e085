"""Recording what the attention layers of a transformers model get, as datasets, while the model runs.

Every attention function of the library is wrapped while a recording is open, and the layers have a hook that notes their
cache; the model and its configuration stay as they are. A layer whose keys grow with each call, in a cache, has its new
tokens appended.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from oocattn import arguments
from oocattn.errors import ProblemError
from oocattn.integrations.asked import asked_of
from oocattn.integrations.caches import filled_rows
from oocattn.integrations.recorded import RecordedLayer, Tensors
from oocattn.storage.locations import Location, parse_location
from oocattn.storage.make.create import create_dataset

EAGER = "eager"
"""The implementation that each model has of its own."""

logger = logging.getLogger("oocattn")

_open: list[Capture] = []
_changing = threading.RLock()


def capture(
    model: torch.nn.Module, path: str | Path, layers: Iterable[int] | None = None, *, overwrite: bool = False
) -> Capture:
    """Record q, k and v of a model's attention layers, after positions were applied, in a Zarr group at `path`.

    `model` is one of transformers, of any attention implementation. From this call on each of `layers` (default: all)
    writes a dataset `layer-INDEX` as it runs: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D], and what the layer asked: scale,
    softcap, mask and sinks, which `oocattn.attention` takes from there. Where keys are cached, later calls append to it.
    End it with `close()`, or as a context manager:

        with capture(model, "store.zarr", layers=[0, 1]):
            model(ids)
        oocattn.attention("store.zarr/layer-0", "out.zarr")

    Of a static cache, the filled part is recorded. A relative `path` is one of the current folder at this call.

    Raises ProblemError for layers that the model does not have, and ResultExistsError where something is at `path`, unless
    it is a Zarr group and `overwrite` is given.
    """
    if not isinstance(model, torch.nn.Module):
        raise arguments.refused("model", model, "a model of transformers")
    modules = {module: name for name, module in model.named_modules() if isinstance(_index(module), int)}
    asked, found = _asked_layers(layers), sorted({_index(module) for module in modules})
    if not found or set(asked or ()) - set(found) or asked == []:
        raise ProblemError(
            f"layers = {'all' if asked is None else asked}: {type(model).__name__} has the layers {found}, by the attribute "
            "layer_idx of its modules; name some of them"
        )
    place = parse_location(path)
    if any(recording.place == place for recording in _open):
        raise ProblemError(f"{place}: another recording goes there, and is open: close() it first")
    with create_dataset(
        place.path or place.text,
        attributes={"model": type(model).__name__},
        overwrite=arguments.boolean("overwrite", overwrite),
    ):
        pass  # layers come to be in it
    return Capture({module: name for module, name in modules.items() if asked is None or _index(module) in asked}, place)


def _asked_layers(layers: Iterable[int] | None) -> list[int] | None:
    """Indices of layers, in the order given; None is all. Raises ProblemError for anything else."""
    if layers is None:
        return None
    try:
        asked = list(layers)
    except TypeError:
        raise arguments.refused("layers", layers, "indices of layers, such as [0, 1]") from None
    return [arguments.integer(0)("layers", index) for index in asked]


class Capture:
    """A recording, open until it is closed; see `capture`."""

    def __init__(self, modules: dict[torch.nn.Module, str], place: Location) -> None:
        self.place = place
        self._modules = modules
        self._layers: dict[torch.nn.Module, RecordedLayer] = {}
        self._caches: WeakValueDictionary[torch.nn.Module, Cache] = WeakValueDictionary()
        self._recording = threading.RLock()
        self._hooks = [module.register_forward_pre_hook(self._note_cache, with_kwargs=True) for module in modules]
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
        for hook in self._hooks:
            hook.remove()
        if not self._layers:
            logger.warning(
                "%s is empty: none of its layers ran while the recording was open; run the model in between", self.place
            )

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.compiler.disable  # type: ignore[untyped-decorator] # generate compiles passes of a static cache on a GPU
    def record(
        self, implementation: str, module: torch.nn.Module, tensors: Tensors, mask: object, options: dict[str, Any]
    ) -> None:
        """Write what a layer got, q, k and v [B, H, N, D], or append it to what it got before; and what it asked."""
        if module not in self._modules:
            return
        with self._recording:
            filled = filled_rows(self._caches.get(module), _index(module), tensors["k"])
            tensors = {part: tensor if part == "q" else tensor[:, :, :filled] for part, tensor in tensors.items()}
            earlier = self._layers.get(module)
            before = None if earlier is None else earlier.call
            call = asked_of(implementation, module, tensors["q"], filled, mask, options, before)
            if earlier is not None:
                earlier.append(tensors, call)
                return
            layer = self._layers[module] = RecordedLayer(self._place_of(module), tensors, call, options.get("s_aux"))
            if call.causal is None:
                logger.warning(
                    "%s: the mask of its model is not recorded, for it is no band of keys (padding, packed texts or a "
                    "bias); attention over it needs arguments that say which keys are attended",
                    layer.place,
                )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_cache(self, module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Remember the cache of a layer that begins to run: its attention function does not get it."""
        self._caches.pop(module, None)
        for each in (*positional, *named.values()):
            if isinstance(each, Cache):
                self._caches[module] = each
            elif type(each).__name__ == "PagedAttentionCache":
                raise ProblemError(
                    f"{self.place}: continuous batching packs several texts into one pass, which is not recorded: run the "
                    "model itself, or generate, on each of them"
                )

    def _place_of(self, module: torch.nn.Module) -> Location:
        """Where a layer is recorded: under its index, or under its name where a module of the same index is there."""
        for name in (f"layer-{_index(module)}", self._modules[module]):
            place = parse_location(f"{self.place.text.rstrip('/')}/{name}")
            if all(place != layer.place for layer in self._layers.values()):
                break
        return place


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
        mask = rest[0] if rest else options.get("attention_mask")
        for recording in tuple(_open):
            recording.record(self.name, module, {"q": query, "k": key, "v": value}, mask, options)
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
