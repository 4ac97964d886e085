"""The command `report`: everything that is known of a run, as a page."""

from __future__ import annotations

import argparse
from dataclasses import replace

import oocattn
from oocattn.cli.documents import show
from oocattn.cli.exit_codes import DONE, FAILED
from oocattn.cli.inputs import add_storage_option, given_storage_options
from oocattn.cli.places import add_scratch
from oocattn.errors import OocattnError

DESCRIPTION = (
    "write what is known of a run as one page, and as JSON; exit code 1 if none has begun, or the certificate failed"
)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("result", metavar="RESULT", help="path or URL of the result that the run was given")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="write the page there (default: page and JSON beside RESULT; no page with --json)",
    )
    add_scratch(parser)
    add_storage_option(parser)


def report(options: argparse.Namespace) -> int:
    """Write the page, and say what is known and where it was written."""
    from oocattn.pipelines.watch.full_report import write_report
    from oocattn.storage.files.operations import words_of

    storage_options = given_storage_options(options)
    if options.output is None and not options.json:
        try:
            found = write_report(options.result, scratch=options.scratch, storage_options=storage_options)
        except OSError as error:
            raise OocattnError(f"{words_of(error)}; --output FILE.html writes the page elsewhere") from error
    else:
        found = oocattn.report(options.result, scratch=options.scratch, storage_options=storage_options)
    if options.output is not None:
        found = replace(found, files=(str(found.to_html(options.output)),))
    show(options, found)
    return FAILED if found.status.certificate == "failed" else DONE
