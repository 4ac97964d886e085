"""Errors that a user meets: what was found, what was expected, what to do."""

from oocattn.text import printable


class OocattnError(Exception):
    """Base of all errors that oocattn raises on purpose; the text is fit to print."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ProblemError(OocattnError, ValueError):
    """The input does not describe an attention problem: shapes, dtypes, options."""


class BudgetError(OocattnError, ValueError):
    """A memory budget is too small for any plan; it names the smallest that works."""


class ResultExistsError(OocattnError, FileExistsError):
    """The result's path is taken by something that this run would destroy."""


class IntegrityError(OocattnError, RuntimeError):
    """Bytes at rest, or the count of attended keys, are not what they must be."""


class TaintedError(IntegrityError):
    """Computed state cannot be trusted: it is discarded, and cannot be resumed."""


class RemoteError(OocattnError, OSError):
    """A remote store did not answer for a minute, or never will; `resume` continues."""


class RemoteDeniedError(RemoteError):
    """A remote store denies an object; some answer so where there is none."""


class LockedError(OocattnError, RuntimeError):
    """Another live run holds the result."""


class WorkerLostError(OocattnError, RuntimeError):
    """Workers died, or their scheduler did, and the run cannot continue without them."""


class TaskError(OocattnError, RuntimeError):
    """A step of a run, `work`, failed for an unforeseen reason, and failed again when retried."""

    def __init__(self, work: str, reason: str) -> None:
        super().__init__(work, reason)
        self.work = work

    def __str__(self) -> str:
        return printable("{} failed: {}".format(*self.args))


class StalledError(OocattnError, RuntimeError):
    """No task of a run has ended for far longer than planned, or three minutes; the work that was done is on disk.

    Also: a run cannot begin, because it would wait for the thread that starts it.
    """


class TimeLimitError(OocattnError, TimeoutError):
    """A run's time limit is reached; what it has done is on disk."""
