"""Threads that compute with none of the caller's settings of torch, each on as many cores as it is given."""

from __future__ import annotations

import threading
from functools import partial

from oocattn.forks import note_computing
from oocattn.threads import ThreadPool, begin_call

_COUNTING = threading.Lock()


def plain_threads(count: int, name: str, cores: int | None = None) -> ThreadPool:
    """A pool of threads that compute with none of the caller's settings, each with `cores` (None: those of the process)."""
    note_computing()
    return ThreadPool(count, name, partial(_begin_plainly, cores))


def _begin_plainly(cores: int | None) -> None:
    import torch  # who only imports this module may do without

    torch.set_flush_denormal(False)  # a thread, and the OpenMP threads that it makes, inherit it on Linux
    with _COUNTING:
        if cores is not None and cores != (usual := torch.get_num_threads()):
            torch.set_num_threads(cores)  # sets it for later threads too, so another thread puts it back at once
            begin_call(torch.set_num_threads, usual).result()
