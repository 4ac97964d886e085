"""What is wrong with a command by its words alone. Nothing that they name is looked at."""

from __future__ import annotations

import argparse
from pathlib import PurePath

from oocattn.arguments import integer
from oocattn.cli.inputs import TENSORS, given_storage_options, named_tensors
from oocattn.errors import ProblemError
from oocattn.naming import named
from oocattn.pipelines.engines import check_engine, refuse_without_pass
from oocattn.planning.options import MAX_CHUNKS
from oocattn.problem.options import ProblemOptions
from oocattn.problem.second_pass import MOST_POOLS, MOST_TOP
from oocattn.storage.locations import output_path, parse_location
from oocattn.storage.paths import ResultPaths
from oocattn.storage.state_folder import STORE


def check_words(options: argparse.Namespace) -> None:
    """Raise ProblemError for a value that an option cannot have, or options that exclude or need each other."""
    given = vars(options)
    if "storage_option" in given:
        given_storage_options(options)
    _check_inputs(options)
    _check_result(options)
    if "scheduler" in given:
        check_engine(options.engine, has_client=options.scheduler is not None, dashboard_address=options.dashboard)
    if given.get("all_rows") is False:
        names = {"scheduler": "client", "dashboard": "dashboard_address"}
        of_pass = ("kernel", "device_memory", "time_limit", "timeline", "progress", "engine", *names)
        refuse_without_pass({names.get(name, name): given[name] for name in of_pass})
    if given.get("chunks") is not None:
        integer(1, MAX_CHUNKS)("chunks", given["chunks"])
    for name, most in {"top": MOST_TOP, "pool": MOST_POOLS}.items():
        if name in given:
            integer(1, most)(name, given[name])
    if "sink_tokens" in given:
        left, right = given["window_size"] or (None, None)
        causal = given["causal"] if "causal" in given else not given["full"]
        ProblemOptions(causal, window_size=(left, right), prefix=given["prefix"], sink_tokens=given["sink_tokens"]).check()
    for name, suffix in {"timeline": ".json", "draw": ".svg", "map": ".png"}.items():
        file = given.get(name)
        if file is not None and PurePath(file).suffix.lower() != suffix:
            raise ProblemError(f"{named(name)} {file}: expected the name of a file that ends in {suffix}")
    if given.get("map") is not None and "pooled" not in given["arrays"]:
        raise ProblemError(f"{named('map')} needs the map: ask for pooled among {named('arrays')} too")


def _check_inputs(options: argparse.Namespace) -> None:
    """Check what names the inputs."""
    if "qkv" in options and (tensors := named_tensors(options)) is not None:
        from oocattn.storage.inputs.opening import check_named  # takes Zarr

        check_named(tensors)
    for name in ("dataset", *TENSORS, "bias"):
        place = getattr(options, name, None)
        if isinstance(place, str) and "://" in place:
            parse_location(place)


def _check_result(options: argparse.Namespace) -> None:
    """Check where the result and its job state are to be."""
    if "result" not in options:
        return
    scratch = getattr(options, "scratch", None)
    if scratch not in (None, STORE):
        output_path(scratch, "scratch folder")
    place = parse_location(options.result, "result")
    if place.path is not None:
        ResultPaths.at(place.path, scratch, getattr(options, "lock", "auto"))
