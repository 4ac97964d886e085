"""Sizes, counts and durations are read and written as people do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocattn import ProblemError
from oocattn.units import format_bytes, format_count, format_seconds, parse_duration, parse_size

SIZES = {
    "1": 1,
    "65536": 65536,
    "64K": 65536,
    "64k": 65536,
    "1M": 1 << 20,
    "2GiB": 2 << 30,
    "2gib": 2 << 30,
    "2 GiB": 2 << 30,
    " 1MiB ": 1 << 20,
    "500MB": 500_000_000,
    "1.5KiB": 1536,
    "0.5K": 512,
    "3T": 3 << 40,
    "7B": 7,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 G i B", "-1", "1e9", "2XB", "iB", "5iB", "0x10", "1,000", "2GiBs", "²"])
def test_text_that_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ProblemError, match=r"device memory .* is not understood: write it as 65536, 64K, 500MB or 2GiB"):
        parse_size(text, "device memory")


HUGE = ["9" * 30, "9" * 20 + "T", "9" * 400, float("inf"), float("nan")]


@pytest.mark.parametrize("text", ["0", "0.5", "1.0001K", 0, -5, *HUGE])
def test_sizes_are_whole_and_positive(text: str | int) -> None:
    with pytest.raises(ProblemError, match="whole number of at least 1"):
        parse_size(text)


@given(st.integers(1, 1 << 62))
def test_integers_are_sizes_already(size: int) -> None:
    assert parse_size(size) == size


@given(st.integers(1, 1 << 52))
def test_integers_as_text_are_exact(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1000 << 20, "1000 MiB"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (5 << 50, "5 PiB")],
)
def test_bytes_have_binary_prefixes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1024, 1 << 59))
def test_bytes_can_be_read_back(count: int) -> None:
    number, unit = format_bytes(count).split()
    prefix = "KMGTP".index(unit[0]) + 1
    assert abs(float(number) * 1024**prefix - count) <= 0.005 * count
    assert 1 <= float(number) < 1024 or unit == "PiB"


def test_counts_have_decimal_prefixes() -> None:
    assert [format_count(count) for count in (7, 1500, 2.2e12, 999_999, 3e21)] == ["7 ", "1.5 k", "2.2 T", "1 M", "3 Z"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.0123 s"), (0.53, "0.53 s"), (119, "119 s"), (120, "2 min"), (7170, "2 h 00 min"), (4000, "67 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_long_durations() -> None:
    assert format_seconds(3 * 3600 + 7 * 60) == "3 h 07 min"
    assert format_seconds(86400 * 3) == "3.0 days"


DURATIONS = {
    "90": 90,
    "45s": 45,
    "10m": 600,
    "8h": 28800,
    "2d": 172800,
    "1h30m": 5400,
    "0": 0,
    " 1 h 30 m ": 5400,
    "1.5h": 5400,
}


@pytest.mark.parametrize(("text", "seconds"), [*DURATIONS.items(), (7, 7), (0.5, 0.5)])
def test_durations_are_read(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-1", "1w", "1h-30m", "h", "1:30", "inf", "nan", "10m!", -1, "40000d", 1e10, *HUGE]
)
def test_text_that_is_no_duration_is_refused(text: str | float) -> None:
    with pytest.raises(ProblemError, match="time limit"):
        parse_duration(text, "time limit")
