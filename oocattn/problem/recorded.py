"""What a model asked when its attention was recorded: arguments of a problem, kept with the dataset in `KEY`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from oocattn.errors import IntegrityError, ProblemError
from oocattn.naming import named, setting
from oocattn.problem.options import Window
from oocattn.problem.problem import Place, Problem
from oocattn.problem.scores import Scale
from oocattn.records import from_json, to_json
from oocattn.text import printable

KEY = ("oocattn", "asked")
"""The attribute of a dataset, and the key in it, that holds the record."""

LEARNABLE_SINK = "learnable_sink"
"""The array of the dataset with the sinks of its model."""

_MASKS = ("causal", "window_size", "cu_seqlens_q", "seqused_k")
"""Arguments of which one must be given where the mask of the model is none that can be asked for."""


@dataclass(frozen=True)
class RecordedCall:
    """The arguments with which attention of the dataset is that of the model; what is None or False has its default.

    `causal` is None where the model's mask is none that can be asked for. With `learnable_sink` the dataset has the array.
    """

    scale: Scale | None = None
    softcap: Scale | None = None
    causal: bool | None = False
    window_size: tuple[Place | None, Place | None] = (None, None)
    learnable_sink: bool = False

    @classmethod
    def read(cls, attributes: Mapping[str, Any], location: str) -> Self | None:
        """The record in a dataset's attributes; None where there is none. Raises IntegrityError for one that is damaged."""
        own = attributes.get(KEY[0])
        content = own.get(KEY[1]) if isinstance(own, Mapping) else None
        if content is None:
            return None
        try:
            return from_json(cls, content)
        except ValueError as error:
            raise IntegrityError(
                f"the attribute {KEY[0]}.{KEY[1]} of {location}, what its model asked, cannot be believed "
                f"({printable(str(error))}): record the layer again, or leave it out with {setting('recorded', False)}"
            ) from None

    def attributes(self) -> dict[str, Any]:
        """The attributes of a dataset that has this record."""
        return {KEY[0]: {KEY[1]: to_json(self)}}

    def complete(self, asked: Mapping[str, Any], location: str) -> dict[str, Any]:
        """Arguments of a problem, with those of the record in the place of those that are None.

        The window belongs to `causal`: where another is given, it is not taken.

        Raises ProblemError where the model had a mask that cannot be asked for, and no mask is given.
        """
        own: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "causal": self.causal,
            "window_size": self.window_size if asked["causal"] in (None, self.causal) else None,
            "learnable_sink": LEARNABLE_SINK if self.learnable_sink else None,
        }
        if self.causal is None and all(asked[name] is None for name in _MASKS):
            raise ProblemError(
                f"{location} was recorded of a model whose mask is no band of keys (padding, packed texts or a bias): say "
                f"which keys are attended, with {named('seqused_k')} or another argument of the mask "
                f"({setting('causal', False)}: all)"
            )
        return {**asked, **{name: value for name, value in own.items() if asked[name] is None}}

    def words(self, problem: Problem) -> Iterator[str]:
        """What a problem asks as recorded, and not by default, in words."""
        if self.scale is not None and problem.scale == self.scale and not problem.has_default_scale:
            yield f"scale {self.scale:g}"
        if self.softcap is not None and problem.softcap == self.softcap:
            yield f"softcap {self.softcap:g}"
        if self.causal and problem.causal:
            yield "causal"
        if self.window != (None, None) and problem.window_size == self.window:
            yield f"window {self.window[0]}, {self.window[1]}".replace("None", "none")
        if self.learnable_sink and LEARNABLE_SINK in problem.digests:
            yield "learnable sinks"

    @property
    def window(self) -> Window:
        """The window, without what `causal` says already."""
        return self.window_size[0], None if self.causal else self.window_size[1]
