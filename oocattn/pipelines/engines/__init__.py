"""Engines, which run the tasks of a run: Dask, or threads of this process."""

from __future__ import annotations

from typing import get_args

from oocattn.errors import ProblemError
from oocattn.planning.machine import Engine as EngineName

ENGINES: tuple[EngineName, ...] = get_args(EngineName)

DASHBOARD = "127.0.0.1:0"
"""Default address of the dashboard: on the loopback, at any free port."""


def check_engine(engine: str, client: object, dashboard_address: str) -> None:
    """Raise ProblemError for a client that a run cannot use or its engine excludes."""
    if engine == "inline" and (client is not None or dashboard_address != DASHBOARD):
        found = "a client (--scheduler)" if client is not None else "a dashboard_address (--dashboard)"
        raise ProblemError(
            f"engine = 'inline' with {found}: it runs on threads of this process, which have neither; leave one of both out"
        )
    if client is not None:
        from oocattn.pipelines.engines.dask.connecting import check_client

        check_client(client)
