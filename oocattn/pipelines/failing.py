"""What goes wrong in a step of a run is raised with the place where it happened: a subproblem, a query chunk, a checkpoint.

A place says nothing of the attempt or the worker, so the same place again is the same failure (`driver.FailureLimits`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from oocattn.errors import OocattnError, TaskError
from oocattn.storage.files.operations import describe_error, is_disk_full

SET_UP, CHECKPOINT = "the set-up of a lane", "a checkpoint"
"""Places that belong to no subproblem and no query chunk."""

PAUSES_SECONDS = 0.1, 0.5  # seconds before the second and the third try of a step that `insist` does

logger = logging.getLogger("oocattn")

T = TypeVar("T")


def place_of(step: str, head_group: int, index: int) -> str:
    """Where a step of a lane works, in words."""
    kind = "subproblem" if step in ("stage", "attend") else "query chunk"
    return f"{kind} {index} of head group {head_group}"


def naming_subproblem(head_group: int, index: int) -> AbstractContextManager[None]:
    """An error that was not foreseen is raised as the TaskError of a subproblem."""
    return naming(place_of("attend", head_group, index))


@contextmanager
def naming(place: str) -> Iterator[None]:
    """An error that was not foreseen is raised as the TaskError of a place; a full disk stays what it is."""
    try:
        yield
    except OocattnError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise
        raise TaskError(place, describe_error(error)) from error


def insist(place: str, step: Callable[[], T]) -> T:
    """What a step returns that can be done again after it has failed; the third failure is raised, as `naming` does."""
    for pause in PAUSES_SECONDS:
        try:
            with naming(place):
                return step()
        except TaskError as error:
            logger.warning("%s; trying again", error)
            time.sleep(pause)
    with naming(place):
        return step()
