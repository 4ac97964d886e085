"""The options that pose a problem over a dataset's arrays, besides the arrays themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from oocattn.errors import ProblemError
from oocattn.naming import as_given, named
from oocattn.problem.given import GivenArrays

Window = tuple[int | None, int | None]
"""Keys before and after a row's own position that it attends at most; None: all."""


@dataclass(frozen=True)
class ProblemOptions:
    """What a caller asks of the attention of a dataset; what each means is in `ProblemArguments`."""

    causal: bool = False
    scale: float | None = None
    out_dtype: str | None = None
    window_size: Window = (None, None)
    prefix: int = 0
    sink_tokens: int = 0
    softcap: float | None = None
    queries: tuple[int, int] | None = None
    heads: tuple[int, ...] | None = None
    key_bias: bool = True
    given: GivenArrays = field(default_factory=GivenArrays)

    def check(self) -> None:
        """Raise ProblemError for options that have no meaning together."""
        left, right = self.window_size
        bounded = left is not None or (right is not None and not self.causal)
        if self.sink_tokens and not bounded:
            raise ProblemError(
                f"{as_given('sink_tokens', self.sink_tokens)} without a window that would leave them out: give "
                f"{named('window_size')}, or leave {named('sink_tokens')} out"
            )
        if self.prefix and not (self.causal or bounded):
            raise ProblemError(
                f"{as_given('prefix', self.prefix)} where every row attends all keys: give {named('causal')} or "
                f"{named('window_size')}, or leave {named('prefix')} out"
            )
