"""What a run works at, as a record that its driver and its attempts share."""

from __future__ import annotations

from dataclasses import dataclass

from oocattn.pipelines.finished import NOTHING_FINISHED, Compared
from oocattn.planning.plan import Plan
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.journal.journal import Journal
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import GrowingResult, RunState


@dataclass(frozen=True)
class Work:
    """What a run works at: a plan over a dataset, into a `growing` result among the places of `state`.

    The `fingerprint` of the dataset within this run must still be the same when all is read. The journal says what is done,
    and `compared` what of that was looked at as the run was resumed.
    """

    plan: Plan
    dataset: Dataset
    fingerprint: str
    state: RunState
    growing: GrowingResult
    journal: Journal
    compared: Compared = NOTHING_FINISHED

    @property
    def paths(self) -> ResultPaths:
        """The places of the result."""
        return self.state.paths

    @property
    def result(self) -> ResultArrays:
        """The arrays of the result that grows."""
        return self.growing.arrays
