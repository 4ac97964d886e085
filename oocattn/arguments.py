"""Checks of a caller's options: a checker for each kind, and `checked`, which applies them before a function begins.

A checker takes the option's name and what was passed. It returns that as Python's own (a bool, int, float, str or tuple), or
raises ProblemError, which names the option, what was found and what was expected. Scalars of NumPy and PyTorch, and their
arrays without dimensions, count as the numbers that they hold; a bool is no number.
"""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from numbers import Real
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from oocattn.errors import ProblemError
from oocattn.naming import as_given
from oocattn.other_names import hint
from oocattn.problem.scores import LEAST_SCALE, MOST_SCALE, SCALES
from oocattn.units import parse_duration, parse_size

if TYPE_CHECKING:  # who passes a scalar or a dtype of these has imported them
    import numpy as np
    import torch

P = ParamSpec("P")
R = TypeVar("R")

Check = Callable[[str, object], Any]
"""(name, value) to the value as Python's own. Raises ProblemError."""

Dtype: TypeAlias = "str | torch.dtype | np.dtype[Any] | type"
"""A dtype as callers name it: "float16", "bf16", torch.float16, numpy.float16."""

Size = float | str
"""Bytes as callers give them: 2147483648, "2GiB"."""

Duration = float | str | timedelta
"""A duration as callers give it: 90, "1h30m", timedelta(minutes=90)."""

MOST_COUNT = 2**48  # of rows, heads and the like: the size of a dimension at most

MOST_SEED = 2**64 - 1

_DTYPES = {
    "float16": ("float16", "fp16", "f16", "half"),
    "bfloat16": ("bfloat16", "bf16"),
    "float32": ("float32", "fp32", "f32", "single", "float"),  # `float` as in torch
}
"""The supported dtypes, and how they are written."""

_shown = Repr()
_shown.maxstring = _shown.maxother = 80


@dataclass(frozen=True)
class Option:
    """An option that several functions share: its default, and what it may be."""

    default: Any
    check: Check


def checked(shared: Mapping[str, Option] | None = None, /, **checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function's options checked first; None passes where it is the default.

    The `shared` options are those that the function takes as `**keywords`, all of which it gets.
    """
    own = shared or {}
    checks |= {name: option.check for name, option in own.items()}

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = _with_options(inspect.signature(function), own)
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

        @wraps(function)
        def checking(*positional: P.args, **options: P.kwargs) -> R:
            for name, value in options.items():
                if name not in defaults:
                    advice = hint(name, defaults)
                    unexpected = f"{function.__name__}() got an unexpected keyword argument {name!r}"
                    raise TypeError(f"{unexpected}: {advice}" if advice else unexpected)
                if name in checks and not (value is None and defaults[name] is None):
                    options[name] = checks[name](name, value)
            for name, option in own.items():
                options.setdefault(name, option.default)
            return function(*positional, **options)

        checking.__signature__ = signature  # type: ignore[attr-defined]
        return checking

    return decorate


def _with_options(signature: inspect.Signature, shared: Mapping[str, Option]) -> inspect.Signature:
    """A signature with options by name in place of its `**keywords`."""
    kept = [each for each in signature.parameters.values() if not shared or each.kind is not each.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default) for name, each in shared.items()]
    first = next((at for at, each in enumerate(kept) if each.kind is each.KEYWORD_ONLY), len(kept))
    return signature.replace(parameters=[*kept[:first], *added, *kept[first:]])


def boolean(name: str, value: object) -> bool:
    """True or False."""
    found = _own(value)
    if isinstance(found, bool):
        return found
    raise refused(name, value, "True or False")


def integer(least: int, most: int = MOST_COUNT) -> Check:
    """A whole number between two, both included."""
    expected = f"a whole number of at least {least}" if most == MOST_COUNT else f"a whole number, {least} to {most:,}"

    def check(name: str, value: object) -> int:
        found = _own(value)
        number = least - 1
        with suppress(TypeError):
            number = least - 1 if isinstance(found, bool) else operator.index(found)  # type: ignore[arg-type]
            if least <= number <= most:
                return number
        raise refused(name, value, f"{expected}, and at most 2^48" if number > most == MOST_COUNT else expected)

    return check


def number(least: float = -math.inf, most: float = math.inf, expected: str = "a finite number") -> Check:
    """A finite number between two, both included."""

    def check(name: str, value: object) -> float:
        found = _real(value)
        if not (math.isfinite(found) and least <= found <= most):
            raise refused(name, value, expected)
        return found

    return check


scale = number(LEAST_SCALE, MOST_SCALE, SCALES)
"""The factor of the scores."""


def size(name: str, value: object) -> int:
    """Bytes, as a whole number or as a text."""
    found = _own(value)
    if not isinstance(found, str) and not math.isfinite(_real(found)):
        raise refused(name, value, 'bytes, as a whole number of at least 1 or like "2GiB"')
    return parse_size(found, name)  # type: ignore[arg-type] # an int is kept as it is


def duration(name: str, value: object) -> float:
    """Seconds, as a number, a timedelta or a text."""
    found = _own(value)
    seconds = found.total_seconds() if isinstance(found, timedelta) else found
    if not isinstance(seconds, str) and not math.isfinite(_real(seconds)):
        raise refused(name, value, 'seconds, as a number of at least 0 or like "8h"')
    return parse_duration(seconds, name)  # type: ignore[arg-type] # a text or a real number


def text(name: str, value: object) -> str:
    """Any text."""
    found = _own(value)
    if not isinstance(found, str):
        raise refused(name, value, "a text")
    return str.__str__(found)


def path(name: str, value: object) -> str | Path:
    """A path."""
    found = _own(value)
    if isinstance(found, str | Path) and str(found):
        return found
    raise refused(name, value, "a path")


def choice(*allowed: str) -> Check:
    """One of some words."""

    def check(name: str, value: object) -> str:
        found = _own(value)
        if isinstance(found, str) and found in allowed:
            return allowed[allowed.index(found)]  # no subclass of str
        raise refused(name, value, f"one of {', '.join(allowed)}")

    return check


def choices(*allowed: str) -> Check:
    """Some of a few words, each once, in their order here; at least one."""

    def check(name: str, value: object) -> tuple[str, ...]:
        words = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
        if not words or any(word not in allowed for word in words):
            raise refused(name, value, f"some of {', '.join(allowed)}")
        return tuple(word for word in allowed if word in words)

    return check


def dtype(name: str, value: object) -> str:
    """The name of a supported dtype, however it is written."""
    written = value
    torch, np = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.dtype):
        written = str(value)
    elif np is not None and isinstance(value, np.dtype | type):
        with suppress(TypeError):
            found = np.dtype(value)
            written = found.name if found.isnative else value
    if isinstance(written, str):
        word = written.lower().removeprefix("torch.").removeprefix("numpy.").removeprefix("np.")
        for supported, words in _DTYPES.items():
            if word in words:
                return supported
    raise refused(name, value, f"one of {', '.join(_DTYPES)}")


def functions(name: str, value: object) -> tuple[Callable[..., Any], ...]:
    """A list, or another sequence, of functions."""
    try:
        found: tuple[Any, ...] = tuple(value)  # type: ignore[arg-type]
    except TypeError:
        raise refused(name, value, "a list of functions of an Event, such as [print]") from None
    for each in found:
        if not callable(each) or inspect.iscoroutinefunction(each):
            raise refused(name, each, "functions of an Event, none of them async")
    return found


def refused(name: str, found: object, expected: str) -> ProblemError:
    """The error that an option was given what it cannot be; argparse names an option itself, in the place of `name`."""
    shown = _shown.repr(found)
    where = as_given(name, found, f"{shown} ({type(found).__name__})") if name else shown
    return ProblemError(f"{where}: expected {expected}")


def _own(value: object) -> object:
    """A scalar of NumPy or PyTorch, or an array without dimensions, as Python's own; None for one that is masked."""
    torch, np = sys.modules.get("torch"), sys.modules.get("numpy")
    foreign = (*((np.generic, np.ndarray) if np else ()), *((torch.Tensor,) if torch else ()))
    if isinstance(value, foreign) and value.ndim == 0:
        if getattr(value, "mask", False):
            return None
        with suppress(RuntimeError):  # a tensor on the device "meta" holds none
            return value.item()
    return value


def _real(value: object) -> float:
    """A real number; NaN for anything else."""
    found = _own(value)
    if isinstance(found, bool) or not isinstance(found, Real):
        return math.nan
    with suppress(OverflowError):
        return float(found)
    return math.inf
