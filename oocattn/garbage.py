"""Python's garbage collector, kept from looking through what imports make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No collection of cyclic garbage while modules are imported: they make objects by the hundred thousand and hardly any
    garbage, and to look through them again and again takes some 0.6 s of a new process.

    Only for the top level of modules: their imports are run once, so that no two threads pause and resume it in turns.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
