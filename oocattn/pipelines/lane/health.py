"""Health of a lane: the time of its last step, and the first error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from oocattn import clock


class Health:
    """Shared by all parts of a lane, which report their steps and failures here."""

    def __init__(self) -> None:
        self.stepped = clock.now()
        """Time of the last step: a tile, a read, a written block, a file of partials."""
        self._error: BaseException | None = None

    def step(self) -> None:
        """Note that a piece of a task is done: the lane works, though the task is long."""
        self.stepped = clock.now()

    def fail(self, error: BaseException) -> None:
        """Stop the lane with this error, unless another one has stopped it before."""
        if self._error is None:
            self._error = error

    @contextmanager
    def reraise_first_failure(self) -> Iterator[None]:
        """Raise the error that stopped the lane, in place of those that follow from it."""
        if self._error is not None:
            raise self._error
        try:
            yield
        except BaseException as error:
            if self._error is None or self._error is error:
                self._error = error
                raise
            raise self._error from None  # a local variable for it would be a reference circle through the traceback

    def close(self) -> None:
        """Forget the error: its traceback refers to whatever failed, memory included."""
        self._error = None
