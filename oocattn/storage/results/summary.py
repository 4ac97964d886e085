"""A result's attributes, and its certificate's summary: JSON alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from oocattn.errors import IntegrityError
from oocattn.pins import Pins
from oocattn.problem.problem import Problem, read_problem
from oocattn.records import ADDED, Excerpt, Positive, from_json
from oocattn.storage.inputs.origin import Origin, check_origins
from oocattn.storage.paths import CERTIFICATE, ResultPaths
from oocattn.storage.results.arguments import read_given
from oocattn.storage.results.checksums import read_bits, result_digest

FORMAT = 4
"""Of a certificate; others are not read."""

Outcome = Literal["passed", "inconclusive", "failed"]

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class DatasetRecord:
    """The dataset of a result: its location and fingerprint at the time, and where tensors lie that are in no group.

    `samples` are digests of some of the numbers; "" in results of older versions.
    """

    location: str
    fingerprint: str
    tensors: Annotated[Mapping[str, Origin], ADDED] = field(default_factory=dict)
    samples: Annotated[str, ADDED] = ""

    def __post_init__(self) -> None:
        check_origins(self.tensors)


@dataclass(frozen=True, kw_only=True)
class PlanRecord(Pins):
    """Some of the plan that a result was computed by."""

    chunk_rows: Positive
    rounds_weights: Annotated[bool, ADDED] = True  # allows more, where an older version has not recorded it


@dataclass(frozen=True)
class ResultAttributes(Excerpt):
    """The attributes of a result: what it is the answer to."""

    problem: Problem
    dataset: DatasetRecord
    plan: PlanRecord
    versions: Mapping[str, str]

    @property
    def borders(self) -> Sequence[int]:
        """The first rows of `out` of all chunks but one."""
        return range(self.plan.chunk_rows, self.problem.out_rows, self.plan.chunk_rows)

    @classmethod
    def read(cls, paths: ResultPaths) -> ResultAttributes:
        """Read the attributes of a finished result, and the arrays that it was given.

        Raises IntegrityError where it is no result of ours.
        """
        content = paths.attributes() or {}
        try:
            found = from_json(cls, content)
            given = read_given(paths.result, found.problem.digests)
            return replace(found, problem=read_problem(content["problem"], given))
        except ValueError as error:
            raise IntegrityError(f"{paths.result}: the attributes do not describe a result of oocattn ({error})") from None


@dataclass(frozen=True)
class Summary(Excerpt):
    """Some of the certificate beside a result."""

    format: Literal[4]
    passed: bool
    inconclusive: bool
    verdict: str
    made: str
    digest: str | None
    problem: Problem
    dataset_recorded: str

    @property
    def outcome(self) -> Outcome:
        """The verdict in one word."""
        return "passed" if self.passed else "inconclusive" if self.inconclusive else "failed"


def read_summary(paths: ResultPaths) -> Summary | None:
    """Read the summary of a result's certificate; None without one. An unreadable one is logged and counts as none."""
    try:
        content = paths.load(CERTIFICATE)
        if content is None:
            return None
        found, recorded = from_json(Summary, content), ResultAttributes.read(paths)
        digest = result_digest(read_bits(paths.result))
    except (ValueError, IntegrityError, OSError) as error:
        logger.warning(
            "the certificate beside %s cannot be read (%s) and counts as none; verify the result again", paths.result, error
        )
        return None
    same = (found.digest, found.problem, found.dataset_recorded) == (digest, recorded.problem, recorded.dataset.fingerprint)
    return found if same else None
