"""Engines, which run the tasks of a run: Dask, or threads of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from oocattn.errors import ProblemError

if TYPE_CHECKING:
    from distributed import Client

    from oocattn.pipelines.engines.base import Engine

INLINE: Literal["inline"] = "inline"

ENGINES = ("dask", INLINE)

DASHBOARD = "127.0.0.1:0"
"""Default address of the dashboard: on the loopback, at any free port."""


def check_engine(engine: str, client: object, dashboard_address: str) -> None:
    """Raise ProblemError for a client that a run cannot use or its engine excludes."""
    if engine == INLINE and (client is not None or dashboard_address != DASHBOARD):
        found = "a client (--scheduler)" if client is not None else "a dashboard_address (--dashboard)"
        raise ProblemError(
            f"engine = 'inline' with {found}: it runs on threads of this process, which have neither; leave one of both out"
        )
    if client is not None:
        from oocattn.pipelines.engines.dask.connecting import check_client

        check_client(client)


def make_engine(client: Client | Literal["inline"]) -> Engine:
    """The engine of a run, alone imported: a Dask client's workers, or "inline"."""
    if client == INLINE:
        from oocattn.pipelines.engines.inline import InlineEngine

        return InlineEngine()
    from oocattn.pipelines.engines.dask.engine import DaskEngine

    return DaskEngine(client)
