"""Sizes, counts and durations as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from oocattn.errors import ProblemError
from oocattn.records import MOST_COUNT

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtKMGT]?)(i?)([bB]?)")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

MOST_SECONDS = 1e9  # of a duration that a user gives: 31 years. A plan with a longer one could not be read back


def ceil_div(count: int, size: int) -> int:
    """The number of parts of `size` that hold `count`: the quotient, rounded up."""
    return -(-count // size)


def round_up(count: int, quantum: int) -> int:
    """The next multiple of `quantum`."""
    return ceil_div(count, quantum) * quantum


def parse_size(text: str | float, unit: str = "size") -> int:
    """Read `1M`, `64K`, `2GiB` or `500MB` as an integer.

    Binary prefixes are those with an i (KiB) or without a B (64K tokens = 65,536); KB, MB, GB are decimal. Raises
    ProblemError for anything else.
    """
    if isinstance(text, str):
        match = _SIZE.fullmatch(text.strip())
        if match is None or (match[3] and not match[2]):
            raise ProblemError(f"{unit} {text!r} is not understood: write it as 65536, 64K, 500MB or 2GiB")
        base = 1000 if match[4] and not match[3] else 1024
        number: Fraction | float = Fraction(match[1]) * base ** _POWER[match[2].upper()]
    else:
        number = text
    if not 1 <= number <= MOST_COUNT or number != int(number):
        raise ProblemError(f"{unit} {text!r} must be a whole number of at least 1, and at most 2^96")
    return int(number)


def parse_duration(text: str | float, name: str = "duration") -> float:
    """Read `90`, `45s`, `10m`, `8h`, `2d` or `1h30m` as seconds.

    Raises ProblemError for anything else, below 0 and beyond `MOST_SECONDS`.
    """
    if isinstance(text, str):
        parts = _DURATION.findall(text.replace(" ", ""))
        understood = len(parts) == 1 or (parts and all(unit for _, unit in parts))
        if not understood or "".join(map("".join, parts)) != text.replace(" ", ""):
            raise ProblemError(f"{name} {text!r} is not understood: write it as 90, 45s, 10m, 8h, 2d or 1h30m")
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    else:
        seconds = float(text)
    if not 0 <= seconds <= MOST_SECONDS:
        raise ProblemError(f"{name} {text!r} must be a number of seconds, at least 0 and at most {MOST_SECONDS:g}")
    return seconds


def format_bytes(count: float) -> str:
    """Bytes with a binary prefix: 1536 -> `1.5 KiB`."""
    return _scale(count, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(count: float) -> str:
    """A count with a decimal prefix, ready for its unit: 2.2e12 -> `2.2 T`."""
    return _scale(count, 1000.0, ("", "k", "M", "G", "T", "P", "E", "Z"))


def _scale(count: float, base: float, prefixes: tuple[str, ...]) -> str:
    power = 0
    while count >= 0.9995 * base and power < len(prefixes) - 1:
        count /= base
        power += 1
    number = f"{count:.0f}" if count >= 999.5 else f"{count:.3g}"
    return f"{number} {prefixes[power]}"


def format_seconds(seconds: float) -> str:
    """A duration: 0.53 -> `0.53 s`, 4000 -> `1 h 07 min`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours / 24:.1f} days"
