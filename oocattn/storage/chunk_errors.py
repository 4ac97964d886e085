"""The errors for a chunk that is missing, torn, too large or undecodable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from oocattn.errors import IntegrityError

_OF_ROOT = re.compile(r"(c[./])?\d+([./]\d+)*|c")  # the key of a chunk, where the array has no name


class PageError(IntegrityError):
    """There is an HTML page where an object should be: so some servers answer for what is missing."""


@contextmanager
def refuse_missing(location: str, key: str) -> Iterator[None]:
    """Raise `missing_chunk` where the file of a chunk is not found."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise missing_chunk(location, key) from None


def missing_chunk(location: str, key: str) -> IntegrityError:
    """The error for a chunk that is not there; `key` starts with the array's name."""
    return IntegrityError(
        f"{chunk_name(location, key)} is missing: Zarr would read it as the fill value; copy it again, or write it "
        "(if it is all fill value, make its array with config={'write_empty_chunks': True})"
    )


def damaged_chunk(location: str, key: str, found: str) -> IntegrityError:
    """The error for a chunk that is there and cannot be what was written."""
    return IntegrityError(f"{chunk_name(location, key)} {found}; copy it again")


def torn_chunk(location: str, key: str, found: int, expected: int) -> IntegrityError:
    """The error for a chunk file of `found` bytes that must have `expected`."""
    return damaged_chunk(location, key, f"has {found} bytes, expected {expected}: it is torn or of another array")


def undecodable_chunk(location: str, key: str, error: object) -> IntegrityError:
    """The error for a chunk that its codecs refuse."""
    return damaged_chunk(location, key, f"cannot be decoded ({error}): it is damaged")


def refuse_html(place: str, content: bytes) -> None:
    """Raise PageError for an HTML page."""
    if content[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise PageError(
            f"{place} is an HTML page ({content[:40]!s}): its server seems to answer so for what is missing; check the URL, "
            "or copy the dataset again"
        ) from None


def chunk_name(location: str, key: str) -> str:
    """Name a chunk for messages: array, coordinates and key, which starts with its name, or is of the root."""
    if _OF_ROOT.fullmatch(key):
        return f"array {location}: chunk {key!r}"
    array, _, chunk = key.partition("/")
    return f"array {array!r} of {location}: chunk {chunk!r} (key {key!r})"
