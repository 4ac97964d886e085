"""Exact attention over tensors that do not fit in memory: Q, K and V in Zarr, streamed, merged and verified."""

from oocattn.garbage import collection_paused
from oocattn.surroundings import in_some_folder

with collection_paused(), in_some_folder():
    # Before Zarr: that imports CuPy where there is one, and torch's import then wakes all of it (0.3 to 1.2 s).
    import torch  # noqa: F401

    import oocattn.log  # noqa: F401 - sets up the logger that all modules get by its name
    from oocattn.api import attention, plan, resume, status, verify
    from oocattn.errors import (
        BudgetError,
        IntegrityError,
        LockedError,
        OocattnError,
        ProblemError,
        RemoteDeniedError,
        RemoteError,
        ResultExistsError,
        StalledError,
        TaskError,
        TimeLimitError,
        WorkerLostError,
    )
    from oocattn.pipelines.session import Result
    from oocattn.pipelines.watch.events import (
        Attended,
        Callback,
        Committed,
        Ended,
        Event,
        Failed,
        Merged,
        Recovered,
        Saved,
        Staged,
        Stalled,
        Started,
        Written,
    )
    from oocattn.pipelines.watch.report import RunReport
    from oocattn.pipelines.watch.status import Status
    from oocattn.planning.plan import Plan
    from oocattn.storage.bfloat16 import BFloat16
    from oocattn.storage.make.importing import import_arrays
    from oocattn.storage.make.synth import synthesise
    from oocattn.verification.certificate import Certificate
    from oocattn.version import __version__

__all__ = [
    "Attended",
    "BFloat16",
    "BudgetError",
    "Callback",
    "Certificate",
    "Committed",
    "Ended",
    "Event",
    "Failed",
    "IntegrityError",
    "LockedError",
    "Merged",
    "OocattnError",
    "Plan",
    "ProblemError",
    "Recovered",
    "RemoteDeniedError",
    "RemoteError",
    "Result",
    "ResultExistsError",
    "RunReport",
    "Saved",
    "Staged",
    "Stalled",
    "StalledError",
    "Started",
    "Status",
    "TaskError",
    "TimeLimitError",
    "WorkerLostError",
    "Written",
    "__version__",
    "attention",
    "import_arrays",
    "plan",
    "resume",
    "status",
    "synthesise",
    "verify",
]
