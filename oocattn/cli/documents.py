"""What `--json` prints: one document on standard output, and nothing else there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol


class Outcome(Protocol):
    """What a command comes to."""

    def to_json(self) -> dict[str, Any]:
        """The outcome as a JSON document."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option of all commands."""
    parser.set_defaults(document=None)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document, and nothing else, on standard output (docs/scripts.md)"
    )


def show(options: argparse.Namespace, outcome: Outcome) -> None:
    """Print what a command comes to, as text now, or as JSON when it ends."""
    if options.json:
        options.document = outcome.to_json()
    else:
        print(outcome, flush=True)


@contextmanager
def document_alone(options: argparse.Namespace) -> Iterator[None]:
    """With --json, have whatever is printed go to standard error, and the document to standard output at the end."""
    if not options.json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
    if options.document is not None:
        print(json.dumps(options.document, allow_nan=False))
