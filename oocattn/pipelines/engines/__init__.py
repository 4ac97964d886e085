"""Engines, which run the tasks of a run: Dask, or threads of this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from oocattn.errors import ProblemError
from oocattn.naming import named, setting
from oocattn.planning.machine import Engine as EngineName

ENGINES: tuple[EngineName, ...] = get_args(EngineName)

DASHBOARD = "127.0.0.1:0"
"""Default address of the dashboard: on the loopback, at any free port."""


def check_engine(engine: EngineName, *, has_client: bool, dashboard_address: str) -> None:
    """Raise ProblemError for an engine that has no use for a client, or a dashboard, that is given."""
    if engine == "inline" and (has_client or dashboard_address != DASHBOARD):
        found = named("client" if has_client else "dashboard_address")
        raise ProblemError(
            f"{setting('engine', 'inline')} with {found}: it runs on threads of this process, which have neither; leave one "
            "of both out"
        )


def refuse_without_pass(given: Mapping[str, object]) -> None:
    """Raise ProblemError for options of a pass that are given where none is asked for."""
    usual = {"engine": "dask", "dashboard_address": DASHBOARD, "progress": False, "callbacks": []}
    for name, value in given.items():
        if value is not None and value != usual.get(name):
            raise ProblemError(f"{named(name)} is of a second pass: give {setting('all_rows', True)} too, or leave it out")
