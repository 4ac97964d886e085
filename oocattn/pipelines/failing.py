"""What goes wrong in a task is told together with what it was to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from oocattn.errors import OocattnError, TaskError
from oocattn.storage.durable import is_disk_full


@contextmanager
def naming_subproblem(head_group: int, index: int) -> Iterator[None]:
    """An error that was not foreseen is raised as the TaskError of a subproblem."""
    with _naming(f"subproblem {index} of head group {head_group}"):
        yield


@contextmanager
def naming_chunk(head_group: int, chunk: int) -> Iterator[None]:
    """An error that was not foreseen is raised as the TaskError of a query chunk."""
    with _naming(f"query chunk {chunk} of head group {head_group}"):
        yield


@contextmanager
def _naming(work: str) -> Iterator[None]:
    try:
        yield
    except OocattnError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise TaskError(work, f"{type(error).__name__}: {error}") from error
