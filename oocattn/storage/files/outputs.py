"""Output files that a user names. Only files of oocattn, told by their first bytes, are replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.pages import HTML_MARK
from oocattn.storage.files.durable import replacement
from oocattn.storage.files.folders import is_taken
from oocattn.storage.files.regular import open_regular, read_exactly
from oocattn.storage.locations import output_path

SVG_MARK = "<!-- written by oocattn, which may replace this file -->"
"""Follows the opening tag of a drawing."""

JSON_MARK = '{"otherData": {"producer": "oocattn"}, '
"""The beginning of a trace."""

PNG_MARK = "written by oocattn, which may replace this file"
"""The comment of a picture of pixels."""

_PNG = b"\x89PNG\r\n\x1a\n".decode("utf-8", "replace")

_HEAD = 512  # bytes at the beginning of a file within which its mark lies


def check_output(path: Path) -> None:
    """Raise ResultExistsError unless `path` is free, or holds a file that oocattn wrote.

    Raises ProblemError where its folder does not exist or cannot be written to, OSError where the file cannot be read.
    """
    folder = path.parent
    removed = folder.is_dir() and not folder.stat().st_nlink  # as a current folder may be
    if removed or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ProblemError(f"{path}: its folder does not exist or cannot be written to; make it first")
    if is_taken(path) and not _is_ours(path):
        raise ResultExistsError(
            f"{path} exists and was not written by oocattn, which replaces only its own files: remove it, or choose another "
            "name"
        )


def write_output(path: Path, write: Callable[[TextIOWrapper], object]) -> None:
    """Have `write` fill the file `path`, atomically, with text, or with bytes through its `buffer`.

    Raises as `check_output`, before and after writing.
    """
    check_output(path)
    with replacement(path.parent.resolve() / path.name, synced=False) as descriptor:
        with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
            write(file)
        check_output(path)  # writing may take a while


def check_drawing(typed: str | Path) -> Path:
    """The path of a drawing. Raises as `check_output`, and ProblemError for a name that does not end in .svg."""
    path = output_path(typed, "picture")
    check_output(path)
    if path.suffix.lower() != ".svg":
        raise ProblemError(
            f"drawing {path}: plans are drawn as SVG, expected the name of a file that ends in .svg, like plan.svg"
        )
    return path


def write_drawing(typed: str | Path, svg: str) -> Path:
    """Write a drawing, an SVG text, with the mark behind its opening tag; return its path. Raises as `check_drawing`."""
    path = check_drawing(typed)
    tag, end, content = svg.partition(">")
    write_output(path, lambda file: file.write(f"{tag}{end}{SVG_MARK}{content}"))
    return path


def _is_ours(path: Path) -> bool:
    try:
        with open_regular(path, follow=False) as descriptor:
            head = read_exactly(descriptor, _HEAD, 0, path).decode("utf-8", "replace")
    except IntegrityError:  # no regular file
        return False
    drawings = (("<svg ", SVG_MARK), (_PNG, PNG_MARK))
    return head.startswith((JSON_MARK, HTML_MARK)) or any(head.startswith(tag) and mark in head for tag, mark in drawings)
