"""Exact attention over tensors that do not fit in memory: Q, K and V in Zarr, streamed, merged and verified."""

# Names are imported when they are first used: PyTorch, Zarr and Dask take seconds, and much here needs none of them.

from __future__ import annotations

from typing import TYPE_CHECKING

import oocattn.log  # noqa: F401 - sets up the logger that all modules get by its name
from oocattn.imports import import_after_zarr, lazy_attributes
from oocattn.version import __version__ as __version__

if TYPE_CHECKING:
    from oocattn import integrations as integrations
    from oocattn import nn as nn
    from oocattn.afterwards import survey as survey
    from oocattn.afterwards import verify as verify
    from oocattn.api import attention as attention
    from oocattn.api import open as open
    from oocattn.api import plan as plan
    from oocattn.api import resume as resume
    from oocattn.errors import BudgetError as BudgetError
    from oocattn.errors import IntegrityError as IntegrityError
    from oocattn.errors import LockedError as LockedError
    from oocattn.errors import OocattnError as OocattnError
    from oocattn.errors import ProblemError as ProblemError
    from oocattn.errors import RemoteDeniedError as RemoteDeniedError
    from oocattn.errors import RemoteError as RemoteError
    from oocattn.errors import ResultExistsError as ResultExistsError
    from oocattn.errors import StalledError as StalledError
    from oocattn.errors import TaskError as TaskError
    from oocattn.errors import TimeLimitError as TimeLimitError
    from oocattn.errors import WorkerLostError as WorkerLostError
    from oocattn.pipelines.result import Result as Result
    from oocattn.pipelines.survey import Survey as Survey
    from oocattn.pipelines.watch.events import Attended as Attended
    from oocattn.pipelines.watch.events import Callback as Callback
    from oocattn.pipelines.watch.events import Committed as Committed
    from oocattn.pipelines.watch.events import Ended as Ended
    from oocattn.pipelines.watch.events import Event as Event
    from oocattn.pipelines.watch.events import Failed as Failed
    from oocattn.pipelines.watch.events import Merged as Merged
    from oocattn.pipelines.watch.events import Progressed as Progressed
    from oocattn.pipelines.watch.events import Recovered as Recovered
    from oocattn.pipelines.watch.events import Saved as Saved
    from oocattn.pipelines.watch.events import Staged as Staged
    from oocattn.pipelines.watch.events import Stalled as Stalled
    from oocattn.pipelines.watch.events import Started as Started
    from oocattn.pipelines.watch.events import Written as Written
    from oocattn.pipelines.watch.full_report import FullReport as FullReport
    from oocattn.pipelines.watch.full_report import report as report
    from oocattn.pipelines.watch.report import RunReport as RunReport
    from oocattn.pipelines.watch.status import status as status
    from oocattn.pipelines.watch.status_record import Status as Status
    from oocattn.planning.ahead import plan_ahead as plan_ahead
    from oocattn.planning.plan import Plan as Plan
    from oocattn.problem_arguments import ProblemArguments as ProblemArguments
    from oocattn.storage.bfloat16 import BFloat16 as BFloat16
    from oocattn.storage.inputs.opening import Inputs as Inputs
    from oocattn.storage.make.importing import import_arrays as import_arrays
    from oocattn.storage.make.synth import synthesise as synthesise
    from oocattn.verification.certificate import Certificate as Certificate

_MODULES = {
    "oocattn": ["integrations", "nn"],
    "oocattn.afterwards": ["survey", "verify"],
    "oocattn.api": ["attention", "open", "plan", "resume"],
    "oocattn.errors": [
        "BudgetError",
        "IntegrityError",
        "LockedError",
        "OocattnError",
        "ProblemError",
        "RemoteDeniedError",
        "RemoteError",
        "ResultExistsError",
        "StalledError",
        "TaskError",
        "TimeLimitError",
        "WorkerLostError",
    ],
    "oocattn.pipelines.result": ["Result"],
    "oocattn.pipelines.survey": ["Survey"],
    "oocattn.pipelines.watch.events": [
        "Attended",
        "Callback",
        "Committed",
        "Ended",
        "Event",
        "Failed",
        "Merged",
        "Progressed",
        "Recovered",
        "Saved",
        "Staged",
        "Stalled",
        "Started",
        "Written",
    ],
    "oocattn.pipelines.watch.full_report": ["FullReport", "report"],
    "oocattn.pipelines.watch.report": ["RunReport"],
    "oocattn.pipelines.watch.status": ["status"],
    "oocattn.pipelines.watch.status_record": ["Status"],
    "oocattn.planning.ahead": ["plan_ahead"],
    "oocattn.planning.plan": ["Plan"],
    "oocattn.problem_arguments": ["ProblemArguments"],
    "oocattn.storage.bfloat16": ["BFloat16"],
    "oocattn.storage.inputs.opening": ["Inputs"],
    "oocattn.storage.make.importing": ["import_arrays"],
    "oocattn.storage.make.synth": ["synthesise"],
    "oocattn.verification.certificate": ["Certificate"],
}
"""The module of each public name."""

__all__ = ["__version__", *(name for names in _MODULES.values() for name in names)]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)

import_after_zarr("oocattn.storage.bfloat16")  # zarr 3.1 does not look at entry points
