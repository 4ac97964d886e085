"""The layout of each tensor: its dimension names where it has any, else what the caller says, else the usual one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from oocattn import naming
from oocattn.arguments import choice
from oocattn.errors import ProblemError
from oocattn.storage.inputs.meaning import order_by_names

if TYPE_CHECKING:
    from oocattn.storage.inputs.source import Opened

LayoutLike: TypeAlias = "str | Mapping[str, str] | None"
"""The order of axes, of all tensors or of each by its name, as callers give it."""


def agreed_layouts(opened: Mapping[str, Opened], given: LayoutLike, known: Sequence[str]) -> dict[str, str]:
    """The order of the axes of each tensor, one of `known`.

    Raises ProblemError, which names the tensor, where it is said twice, and not the same.
    """
    given = check_layout("layout", given, known, tuple(opened))
    named = {name: order_by_names(name, f"{name} ({each.label})", each.names) for name, each in opened.items()}
    of_each = given if isinstance(given, Mapping) else dict.fromkeys(opened, given)
    for name, order in named.items():
        said = of_each.get(name)
        # A layout for all is that of tensors without names, where there are any.
        if said is not None and order not in (None, said) and (isinstance(given, Mapping) or None not in named.values()):
            raise ProblemError(
                f"{naming.as_given('layout', said)}, but the dimension names of {name} ({opened[name].label}) say {order}: "
                f"expected the same of both; leave {naming.named('layout')} out, or correct the names if they are wrong"
            )
    return {name: order or of_each.get(name) or known[0] for name, order in named.items()}


def check_layout(name: str, given: object, known: Sequence[str], tensors: Sequence[str]) -> Any:
    """Return a layout as a caller gives it. Raises ProblemError for one of no use."""
    if not isinstance(given, Mapping):
        return None if given is None else choice(*known)(name, given)
    if others := [each for each in given if each not in tensors]:
        raise ProblemError(f"{name} has the key {others[0]!r:.80}: expected {', '.join(tensors)}")
    return {tensor: choice(*known)(f"{name} of {tensor}", order) for tensor, order in given.items()}


def show_layout(orders: Mapping[str, str]) -> str:
    """The layouts of tensors as a text of the command."""
    same = len(set(orders.values())) == 1
    return next(iter(orders.values())) if same else ",".join(f"{name}={order}" for name, order in orders.items())
