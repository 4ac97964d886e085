"""The options that say where the job state of a run is, and how runs to one result keep apart."""

from __future__ import annotations

import argparse

from oocattn.storage.paths import LOCKS


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run to a result in a store."""
    add_scratch(parser)
    parser.add_argument(
        "--lock",
        choices=LOCKS,
        default="auto",
        help="none: no lock in the store of RESULT, for one without conditional puts (default: %(default)s)",
    )


def add_scratch(parser: argparse.ArgumentParser) -> None:
    """Add where its job state is."""
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="folder of journal and partials where RESULT is a URL (default: called after it, in the current folder); "
        "store: in the store, so that another machine can resume",
    )
