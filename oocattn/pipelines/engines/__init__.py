"""What runs the tasks of a run: Dask (default), or threads of this process. `base` says what an engine is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from distributed import Client

    from oocattn.pipelines.engines.base import Engine

ENGINES = ("dask", "inline")


def make_engine(client: Client | Literal["inline"]) -> Engine:
    """The engine of a run on the workers of a Dask client, or "inline". Only the one that is used is imported."""
    if client == "inline":
        from oocattn.pipelines.engines.inline import InlineEngine

        return InlineEngine()
    from oocattn.pipelines.engines.dask.engine import DaskEngine

    return DaskEngine(client)
