"""The command `verify`: a finished result checked, by some of its rows or by all."""

from __future__ import annotations

import argparse

import oocattn
from oocattn.cli.carrying_out import PassTimer, PlanPrinter, add_pass, add_watching, carrying_out
from oocattn.cli.documents import show
from oocattn.cli.exit_codes import DONE, FAILED, INCONCLUSIVE
from oocattn.cli.inputs import given_storage_options, moved_inputs
from oocattn.cli.readers import SEED, size
from oocattn.shown import NAME_WIDTH
from oocattn.text import printable


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("result", metavar="RESULT", help="path or URL of a finished result")
    add("--rows", type=size, metavar="R", help="number of rows to recompute (default: 64, or 8 with --all-rows)")
    add("--seed", type=SEED, default=0, help="seed of the random rows (default: %(default)s)")
    add("--host-memory", type=size, metavar="SIZE", help="hard limit on host memory (default: half of the free memory)")
    add("--no-checksums", dest="checksums", action="store_false", help="check rows only; do not compare checksums")
    add(
        "--all-rows",
        action="store_true",
        help="check every row by a second pass over all pairs, which can be cut off and goes on when asked for again",
    )
    group = parser.add_argument_group("with --all-rows")
    add_pass(group, "proofs")
    add_watching(group)


def verify(options: argparse.Namespace) -> int:
    """Verify a result, and print its certificate and where it is; of a second pass the plan, too, and what that took."""
    names = ("rows", "seed", "host_memory", "checksums", "all_rows", "kernel", "device_memory")
    chosen = {name: getattr(options, name) for name in names}
    chosen |= {"inputs": moved_inputs(options), "storage_options": given_storage_options(options)}
    timer = PassTimer()
    if options.all_rows:
        with carrying_out(options, PlanPrinter(silent=options.json), timer) as how:
            certificate = oocattn.verify(options.result, **chosen, **how)
    else:
        certificate = oocattn.verify(options.result, **chosen)
    if options.all_rows and not options.json:
        print(f"{'time':<{NAME_WIDTH}} {timer}")
    if certificate.files and not options.json:
        print(f"certificate  {printable(', '.join(certificate.files))}")
    show(options, certificate)
    if certificate.inconclusive:
        return INCONCLUSIVE
    return DONE if certificate.passed else FAILED
