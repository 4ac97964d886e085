"""The errors for a chunk that is missing, torn, too large or undecodable, and for an HTML page in its place."""

from __future__ import annotations

from oocattn.errors import IntegrityError
from oocattn.text import printable


def missing_chunk(location: str, key: str) -> IntegrityError:
    """The error for a chunk that is not there; `key` starts with the array's name."""
    return IntegrityError(
        f"{described(location, key)} is missing: Zarr would read it as the fill value; copy it again, or write it "
        "(with write_empty_chunks=True if it is all fill value)"
    )


def no_file(location: str, key: str) -> IntegrityError:
    """The error for a chunk that is a folder, a FIFO or a device."""
    return IntegrityError(f"{described(location, key)} is no regular file: expected one; copy it again")


def wrong_size(location: str, key: str, found: int, expected: int) -> IntegrityError:
    """The error for a chunk file of `found` bytes that must have `expected`."""
    return IntegrityError(
        f"{described(location, key)} has {found} bytes, expected {expected}: it is torn or of another array; copy it again"
    )


def is_html(content: bytes) -> bool:
    """Whether this is the beginning of a page for people, with which some servers answer for what they have not."""
    return content[:64].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def html_page(place: str, content: bytes) -> IntegrityError:
    """The error for a page that stands where metadata or a chunk should."""
    return IntegrityError(
        f"{printable(place)} is an HTML page ({printable(content[:40])}): its server seems to answer so for what is "
        "missing; check the URL, or copy the dataset again"
    )


def too_large(location: str, key: str, most: int) -> IntegrityError:
    """The error for a stored chunk of more than `most` bytes."""
    return IntegrityError(f"{described(location, key)} has more than {most} bytes, the most that it can have; copy it again")


def undecodable(location: str, key: str, error: object) -> IntegrityError:
    """The error for a chunk that its codecs refuse."""
    return IntegrityError(f"{described(location, key)} cannot be decoded ({printable(error)}): it is damaged; copy it again")


def described(location: str, key: str) -> str:
    """A chunk as messages name it: its array, its coordinates and its key, which starts with the array's name."""
    array, _, chunk = key.partition("/")
    return f"array {array!r} of {printable(location)}: chunk {chunk!r} (key {key!r})"
