"""Where a tensor lies, as journals, results and certificates record it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from oocattn.problem.arrays import KEY_BIAS
from oocattn.problem.second_pass import LSE
from oocattn.records import ADDED, Count, Pattern, Positive
from oocattn.storage.inputs.axes import BHND, Axes
from oocattn.storage.inputs.layouts import show_layout


@dataclass(frozen=True)
class Numbers:
    """Elements of a file that says nothing of them, `strides` bytes apart."""

    dtype: Annotated[str, Pattern("[<>|=]f[248]|bfloat16")]
    offset: Count
    shape: tuple[Count, ...]
    strides: tuple[Positive, ...]


@dataclass(frozen=True)
class Origin:
    """Where a tensor lies, as journals and results keep it.

    `location` is an absolute path, a URL without credentials, or "" for what only this process has; `tensor` the name in a
    file or group.
    """

    kind: str
    location: str
    tensor: str = ""
    axes: Axes = BHND
    numbers: Annotated[Numbers | None, ADDED] = None

    def __str__(self) -> str:
        return f"{self.location}:{self.tensor}" if self.tensor else self.location or self._object

    @property
    def _object(self) -> str:
        """What it is that only its caller had."""
        return "a tensor in memory" if self.kind == "memory" else f"a tensor of its caller's ({self.kind})"

    @property
    def in_memory(self) -> bool:
        """Whether its fingerprint is a checksum of all of its numbers."""
        return not self.location and not self.kind.startswith("zarr")

    @property
    def recorded(self) -> Origin:
        """What is recorded of it: of numbers in memory, neither whose they are nor how they lie."""
        if self.location:
            return self
        return replace(self, kind=self.kind if self.kind.startswith("zarr") else "memory", axes=BHND)


def check_origins(origins: Mapping[str, Origin]) -> None:
    """Raise ValueError where a record names tensors one by one, but not q, k and v, and perhaps what else a run reads."""
    if origins and origins.keys() - {KEY_BIAS, LSE} != {"q", "k", "v"}:
        raise ValueError(f"tensors are {sorted(origins)!s:.80}, expected q, k and v, and perhaps {KEY_BIAS} or {LSE}")


def recorded_inputs(location: str, origins: Mapping[str, Origin]) -> list[str] | None:
    """The options by which the command line names the inputs of a record again, none where it finds them by itself.

    None where no option can name them.
    """
    places = [origin.location for origin in origins.values()] or [location]
    return [] if all(place.startswith("/") for place in places) else named_inputs(location, origins)


def named_inputs(location: str, origins: Mapping[str, Origin]) -> list[str] | None:
    """The options by which the command line names the inputs of a record; None where they were a caller's own."""
    if origins:
        return command_options(origins)
    return ["--dataset", location] if is_place(location) else None


def is_place(recorded: str) -> bool:
    """Whether a record names a path or URL, and not a store that only its caller had."""
    return recorded.startswith("/") or "://" in recorded


def command_options(origins: Mapping[str, Origin]) -> list[str] | None:
    """The options by which the command line names these tensors; None where one of them has no place to be named."""
    if not all(origin.location and origin.numbers is None for origin in origins.values()):
        return None
    axes = origins["q"].axes
    orders = {name: origins[name].axes.order for name in (("q",) if axes.packed else ("q", "k", "v"))}
    if axes.packed:
        options = ["--qkv", str(origins["q"])]
        if axes.heads:
            options += ["--qkv-heads", f"{axes.heads},{origins['k'].axes.heads}"]
    else:
        options = [part for name in ("q", "k", "v") for part in (f"--{name}", str(origins[name]))]
    if KEY_BIAS in origins:
        options += ["--key-bias", str(origins[KEY_BIAS])]
    return [*options, "--layout", show_layout(orders)]
