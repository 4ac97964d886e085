"""The settings of this process that a call must leave as it found them."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
import warnings
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
OF_OTHERS = re.compile(
    r"PYTEST_|__DASK_|TORCHINDUCTOR_|(OMP|MKL|OPENBLAS)_NUM_THREADS$|MALLOC_TRIM_THRESHOLD_$|PYTHONHASHSEED$"
)
"""Variables that pytest sets, that PyTorch sets as it is imported, and that Dask sets where it starts processes."""

USUAL_INTERVAL = sys.getswitchinterval()

LOGGERS = ("", "oocattn", "distributed", "asyncio", "tornado")


def process_state() -> dict[str, Any]:
    """The settings by name, of torch and Dask only where they are imported."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        folder = ""
    state: dict[str, Any] = {
        "warning filters": list(warnings.filters),
        "modules": len(sys.modules),
        "switch interval": sys.getswitchinterval(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "current folder": folder,
        "environment": {name: value for name, value in os.environ.items() if not OF_OTHERS.match(name)},
        "signal handlers": {number: signal.getsignal(number) for number in SIGNALS},
    }
    for name in LOGGERS:
        logger = logging.getLogger(name)
        handlers = [] if name == "" else list(logger.handlers)  # pytest's own are the root's
        state[f"logger {name!r}"] = (logger.level, logger.propagate, logger.disabled, handlers)
    if (torch := sys.modules.get("torch")) is not None:
        state["threads of torch"] = torch.get_num_threads()
        state["default dtype of torch"] = torch.get_default_dtype()
        state["precision of torch"] = (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.get_deterministic_debug_mode(),
        )
    if (dask := sys.modules.get("dask")) is not None and hasattr(dask, "config"):
        state["dask.config"] = repr(dask.config.config)
    if (distributed := sys.modules.get("distributed")) is not None and hasattr(distributed, "Worker"):
        there = {worker.address_safe: worker.status.name for worker in list(distributed.Worker._instances)}
        state["Dask workers of this process"] = {name: status for name, status in there.items() if status != "closed"}
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What has changed; what was imported meanwhile has no state before."""
    changed = []
    imported = before.pop("modules") != after.pop("modules")  # libraries add filters of warnings as they are imported
    for name, value in before.items():
        if name == "warning filters" and imported:
            continue
        if name == "switch interval" and after[name] == USUAL_INTERVAL:
            continue  # a lane that an earlier test had held was collected as garbage
        if after[name] != value:
            if isinstance(value, dict):
                keys = [key for key in {**value, **after[name]} if value.get(key) != after[name].get(key)]
                changed.append(f"{name}: {', '.join(map(str, keys))}")
            else:
                changed.append(f"{name}: {value!r:.300} before, {after[name]!r:.300} after")
    return changed
