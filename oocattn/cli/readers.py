"""What the texts of options are read as, for argparse: each is checked as the Python functions check their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from oocattn import arguments
from oocattn.errors import ProblemError
from oocattn.planning.devices import disk_rate
from oocattn.problem.arrays import DTYPES
from oocattn.problem.second_pass import ARRAYS
from oocattn.problem_arguments import softcap
from oocattn.units import parse_duration, parse_size


def _reader(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a function that reads an option's text, for argparse, and checks it as the Python functions do."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ProblemError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

    return read


def _parse_count(text: str) -> int:
    if text.strip().startswith("-"):
        raise ProblemError(f"{text!r}: expected a whole number of at least 0")
    return 0 if text.strip() == "0" else parse_size(text)


def _parse_side(text: str) -> int | None:
    return None if text in ("-1", "none") else _parse_count(text)


def _parse_span(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start and stop):
        raise arguments.refused("", text, "START:STOP")
    return _parse_count(start), _parse_count(stop)


def _parse_indices(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise arguments.refused("", text, "whole numbers, H,H,...") from None


def _parse_arrays(text: str) -> tuple[str, ...]:
    found: tuple[str, ...] = arguments.choices(*ARRAYS)("", [name.strip() for name in text.split(",")])
    return found


def _parse_numbers(text: str) -> list[float] | str:
    """Numbers between commas; any other text is the path of a file or the name of an array."""
    try:
        return [int(each) if each.strip().lstrip("+-").isdecimal() else float(each) for each in text.split(",")]
    except ValueError:
        return text


size, duration = _reader(parse_size), _reader(parse_duration)
count, side = _reader(_parse_count), _reader(_parse_side)
span, indices, numbers = _reader(_parse_span), _reader(_parse_indices), _reader(_parse_numbers)
surveyed = _reader(_parse_arrays)
DTYPE: dict[str, Any] = {"type": _reader(partial(arguments.dtype, "")), "metavar": f"{{{','.join(DTYPES)}}}"}
SEED = _reader(lambda text: arguments.integer(0, arguments.MOST_SEED)("", int(text)))
SCALE = _reader(lambda text: arguments.scale("", float(text)))
SOFTCAP = _reader(lambda text: softcap("", float(text)))
DISK_RATE = _reader(lambda text: disk_rate("", text))
MEAN = _reader(lambda text: arguments.number()("", float(text)))
