"""Engines, which run the tasks of a run: Dask, or threads of this process."""

from __future__ import annotations

from typing import get_args

from oocattn.planning.machine import Engine as EngineName

ENGINES: tuple[EngineName, ...] = get_args(EngineName)

DASHBOARD = "127.0.0.1:0"
"""Default address of the dashboard: on the loopback, at any free port."""
