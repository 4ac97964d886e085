"""The command `survey`: what the rows of a finished result attend, added to it as arrays and drawn."""

from __future__ import annotations

import argparse

import oocattn
from oocattn.cli.carrying_out import PlanPrinter, add_pass, add_watching, carrying_out
from oocattn.cli.documents import show
from oocattn.cli.exit_codes import DONE
from oocattn.cli.inputs import given_storage_options, moved_inputs
from oocattn.cli.places import add_place
from oocattn.cli.readers import size, surveyed
from oocattn.problem.second_pass import ARRAYS
from oocattn.text import printable


def add_survey(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("result", metavar="RESULT", help="path or URL of a finished result, which the arrays are added to")
    add(
        "--arrays",
        type=surveyed,
        metavar="A,A,...",
        default=ARRAYS,
        help="what is added, of received, entropy, top_keys and pooled: the weights that each key receives, each row's "
        "entropy, its top keys with their weights, and a map of weights pooled over blocks (default: all)",
    )
    add("--top", type=size, default=8, metavar="K", help="keys of each row in top_keys (default: %(default)s)")
    add("--pool", type=size, default=1024, metavar="C", help="most blocks along a side of the map (default: %(default)s)")
    add("--mean-heads", action="store_true", help="average the map over heads")
    add("--draw", dest="map", metavar="FILE.png", help="draw the map, a panel for each head; needs matplotlib")
    add("--host-memory", type=size, metavar="SIZE", help="hard limit on host memory (default: half of the free memory)")
    add_pass(parser, "surveys")
    add("--overwrite", action="store_true", help="replace arrays of another survey, and throw its unfinished pass away")
    add_place(parser)
    add_watching(parser)


def survey(options: argparse.Namespace) -> int:
    """Survey a result, and print the plan of the pass, what was added, and how long that took."""
    if options.map:
        from oocattn.pipelines.survey import check_map  # takes PyTorch

        there = oocattn.open(options.result, scratch=options.scratch, storage_options=given_storage_options(options))
        check_map(options.map, there, mean_heads=options.mean_heads)  # before anything is computed
    names = "arrays", "top", "pool", "mean_heads", "host_memory", "kernel", "device_memory", "overwrite", "scratch", "lock"
    chosen = {name: getattr(options, name) for name in names}
    chosen |= {"inputs": moved_inputs(options), "storage_options": given_storage_options(options)}
    with carrying_out(options, PlanPrinter(silent=options.json)) as how:
        found = oocattn.survey(options.result, **chosen, **how)
    if found.seconds is None:
        untimed = f", and {options.timeline} not written" if options.timeline else ""
        print(printable(f"{found.path} has these arrays already; nothing was computed{untimed}"))
    show(options, found)
    if options.map:
        found.visualize(options.map)
        print(f"drawn in {printable(options.map)}")
    return DONE
