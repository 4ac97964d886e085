"""The errors that a user meets. Every message says what was found, what was expected and what to do."""


class OocattnError(Exception):
    """Base of every error that oocattn raises on purpose."""


class ProblemError(OocattnError, ValueError):
    """The input does not describe an attention problem: shapes, heads, dtypes, options."""


class BudgetError(OocattnError, ValueError):
    """A memory budget is too small for any plan; the message names the smallest that works."""


class ResultExistsError(OocattnError, FileExistsError):
    """The result's path is taken by something that this run would destroy."""


class IntegrityError(OocattnError, RuntimeError):
    """Bytes at rest, or the count of attended keys, are not what they must be."""


class TaintedError(IntegrityError):
    """What a run has computed cannot be trusted: it is discarded, and cannot be resumed."""


class LockedError(OocattnError, RuntimeError):
    """Another live run holds the result."""


class WorkerLostError(OocattnError, RuntimeError):
    """A worker died in the middle of a run."""
