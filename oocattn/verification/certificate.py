"""The certificate of a result, as a record and as JSON, and what follows from its findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from oocattn.errors import IntegrityError
from oocattn.problem.checks import check_problem
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Positive, Range, from_json, to_json
from oocattn.shown import Shown
from oocattn.storage.inputs.origin import Origin, named_inputs
from oocattn.storage.results.rows import Damage
from oocattn.storage.results.summary import FORMAT, Outcome, PlanRecord
from oocattn.text import shell_command
from oocattn.verification.findings import AllRows, ArrayCheck, Ledger, RowCheck, Stratum, check_places, largest, stratum_of
from oocattn.verification.sampling import STRATA, share_bound
from oocattn.verification.text import (
    all_rows_line,
    certificate_text,
    checksum_lines,
    dataset_line,
    error_line,
    ledger_line,
    weights_line,
)

MOST_SHOWING_NOTHING = 0.1  # the share of rows that show nothing above which a certificate is inconclusive
_FOLLOWS = ("passed", "inconclusive", "verdict", "statement", "strata", "error", "worst_error")


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """The outcome of `verify`.

    `dataset` says where q, k and v were read, and `tensors` where each was, unless they are in one group.

    `words` say what was asked, also without the arrays that the problem was given, such as the boundaries of documents.
    `asked` (the most rows) and `seed` determine the sample. `dataset_recorded` and `dataset_found` are the fingerprints of
    the dataset that the run read and of the one read now; `digest` is the identity of the result's bits as written (None:
    no checksums are recorded); `ledger` is None where the run's report was not beside the result. `computed_with` and
    `verified_with` are versions, `made` is when. `plan` is what the result records of its plan (None in
    certificates of older versions). `all_rows` is what a second pass showed, None where none was asked for. `files` are
    where it was written.
    """

    result: str
    dataset: str
    problem: Problem
    words: str
    asked: Positive
    seed: Annotated[int, Range(0, math.inf)]
    rows: tuple[RowCheck, ...]
    arrays: tuple[ArrayCheck, ...]
    digest: str | None
    ledger: Ledger | None
    dataset_recorded: str
    dataset_found: str
    computed_with: Mapping[str, str]
    verified_with: Mapping[str, str]
    made: str = field(compare=False)
    tensors: Annotated[Mapping[str, Origin], ADDED] = field(default_factory=dict)
    plan: Annotated[PlanRecord | None, ADDED] = None
    all_rows: Annotated[AllRows | None, ADDED] = None
    files: Annotated[tuple[str, ...], ADDED] = field(default=(), compare=False)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong or damaged, and most rows show something."""
        return not self.failed and not self.inconclusive

    @property
    def failed(self) -> bool:
        """Whether a recomputed row is wrong, or a part of the result is damaged."""
        return bool(self.wrong or self.damaged or (self.all_rows is not None and self.all_rows.wrong_rows))

    @property
    def inconclusive(self) -> bool:
        """Whether nothing is wrong, but over a tenth of the rows show nothing, or a second pass left rows open."""
        return not self.failed and (self._mostly_vague or (self.all_rows is not None and self.all_rows.inconclusive))

    @property
    def _mostly_vague(self) -> bool:
        return len(self.showing_nothing) > MOST_SHOWING_NOTHING * len(self.rows)

    @property
    def outcome(self) -> Outcome:
        """The verdict in one word."""
        return "passed" if self.passed else "inconclusive" if self.inconclusive else "failed"

    @property
    def wrong(self) -> list[RowCheck]:
        """The sampled rows that are not right."""
        return [row for row in self.rows if not row.passed]

    @property
    def named_wrong(self) -> list[RowCheck]:
        """The wrong rows of the sample, and of those that a second pass found."""
        sampled = {(row.batch, row.head, row.token) for row in self.wrong}
        found = self.all_rows.wrong if self.all_rows is not None else ()
        return [*self.wrong, *(row for row in found if (row.batch, row.head, row.token) not in sampled)]

    @property
    def showing_nothing(self) -> list[RowCheck]:
        """The right rows of which float32 arithmetic may lose more than 1%."""
        return [row for row in self.rows if row.passed and not row.shows]

    @property
    def damaged(self) -> list[Damage]:
        """The parts of the result that are not as they were written."""
        return [damage for array in self.arrays for damage in array.damaged]

    @property
    def dataset_unchanged(self) -> bool:
        """Whether the dataset is the run's, as far as its fingerprint tells."""
        return self.dataset_found == self.dataset_recorded

    @property
    def error(self) -> float:
        """The root mean square of the rows' relative errors of `out`. Rows that show nothing are left out, unless all do."""
        return math.hypot(*self._errors) / math.sqrt(len(self._errors))

    @property
    def worst_error(self) -> float:
        """The largest relative error of `out` of the same rows."""
        return largest(self._errors)

    @property
    def _errors(self) -> list[float]:
        showing = [row.error for row in self.rows if row.shows or not row.passed]
        return showing or [row.error for row in self.rows]

    @property
    def drawn(self) -> int:
        """Rows that were drawn uniformly at random."""
        return sum("uniform" in row.strata for row in self.rows)

    @property
    def conclusive(self) -> int:
        """The number of uniformly drawn rows that show something."""
        return sum("uniform" in row.strata and row.shows for row in self.rows)

    @property
    def statement(self) -> str:
        """What is known of all rows: by a second pass where there was one, and by the sample."""
        if self.all_rows is None:
            return self._of_sample
        return f"{self._of_sample}; {self.all_rows.statement}" if self.wrong else self.all_rows.statement

    @property
    def _of_sample(self) -> str:
        """What the sampled rows show of all the others."""
        drawn, rows, left_out = self.conclusive, self.problem.rows, len(self.showing_nothing)
        if self.wrong:
            return f"{len(self.wrong)} of {len(self.rows)} recomputed rows exceed their tolerance: the result is wrong"
        if not drawn or self._mostly_vague:
            return (
                f"{left_out:,} of {len(self.rows):,} recomputed rows show nothing, because float32 arithmetic may lose more "
                "than 1% of them: nothing is claimed of the other rows"
            )
        if drawn == rows:
            return f"all {rows:,} rows were recomputed, and none exceeds its tolerance"
        row = "rows" if drawn > 1 else "row"
        bound = f"{share_bound(drawn):.2%}"
        claim = f"fewer than 3/{drawn} = {3 / drawn:.2%}" if drawn > 3 else f"at most {bound}"
        exact = f" (1 - 0.05^(1/{drawn}) = {bound})" if drawn > 3 else ""
        but = f"; not counting rows like {left_out:,} of the recomputed ones, which show nothing" if left_out else ""
        return (
            f"of {drawn:,} {row} drawn uniformly at random none exceeds its tolerance: with 95% confidence {claim} of all "
            f"{rows:,} rows do{exact}{but}"
        )

    @property
    def strata(self) -> list[Stratum]:
        """The findings by stratum, and those of all rows."""
        groups = [(name, [row for row in self.rows if name in row.strata]) for name in STRATA]
        return [stratum_of(name, rows) for name, rows in [*groups, ("all", list(self.rows))] if rows]

    @property
    def verdict(self) -> str:
        """One line: also what a certificate that passed does not cover."""
        if self.passed:
            return ", ".join(["passed", *self._left_open()])
        if self.inconclusive:
            return f"inconclusive: {', and '.join(self._open())}"
        reasons = []
        against = "" if self.dataset_unchanged else ", but the dataset is not known to be the one that the run read"
        if self.wrong:
            reasons.append(f"{len(self.wrong)} of {len(self.rows)} rows are wrong{against}")
        if self.all_rows is not None and self.all_rows.wrong_rows:
            found = self.all_rows
            least = f"at least {found.wrong_rows:,}" if found.undecided else f"{found.wrong_rows:,}"
            worst = f" (of {found.suspected:,} that differ, the {found.recomputed:,} worst were recomputed)"
            are = f"{'is' if found.wrong_rows == 1 else 'are'} wrong{worst if found.undecided else ''}{against}"
            reasons.append(f"{least} of {found.rows:,} rows, found by a second pass, {are}")
        if self.damaged:
            parts = sum(array.parts for array in self.arrays)
            reasons.append(f"{len(self.damaged)} of {parts:,} parts are not as they were written")
        return f"FAILED: {', and '.join(reasons)}; compute it again with `oocattn run --overwrite`, or take another copy"

    def _open(self) -> list[str]:
        """Why a certificate is inconclusive."""
        found = []
        if self._mostly_vague:
            found.append(
                f"{len(self.showing_nothing)} of {len(self.rows)} rows show nothing, because their scores or "
                "values are so large, or cancel so far, that float32 arithmetic may lose more than 1% of them"
            )
        if self.all_rows is not None and self.all_rows.undecided:
            found.append(
                f"{self.all_rows.suspected:,} rows differ from a second pass, and only {self.all_rows.recomputed:,} of them "
                "were recomputed, which are right"
            )
        elif self.all_rows is not None and self.all_rows.vague:
            found.append(
                f"arithmetic may lose so much of {self.all_rows.open:,} rows that a second pass does not show errors of 10%"
            )
        return found

    def _left_open(self) -> list[str]:
        """What would have to be known besides the rows."""
        found = []
        if any(array.state != "checked" for array in self.arrays):
            found.append("the rows alone: not all checksums were compared")
        if not self.dataset_unchanged:
            found.append("against a dataset that is not known to be the one that the run read")
        if self.ledger is not None and self.ledger.counted != self.ledger.expected:
            found.append("but the report beside the result is not that of its run")
        if self.ledger is not None and self.ledger.out_overflowed:
            found.append(f"but {self.ledger.out_overflowed:,} elements of out are Inf, too large for its dtype")
        if self.ledger is not None and self.ledger.out_underflowed:
            found.append(f"but {self.ledger.out_underflowed:,} elements of out are 0, too small for its dtype")
        return found

    @property
    def again(self) -> str:
        """The command that checks the same rows again, or the call where no command can name the inputs."""
        named = named_inputs(self.dataset, self.tensors)
        if named is None:
            every = ", all_rows=True" if self.all_rows is not None else ""
            return f"oocattn.verify({self.result!r}, inputs=..., rows={self.asked}, seed={self.seed}{every})"
        sample = ["--rows", str(self.asked), "--seed", str(self.seed)]
        sample += ["--all-rows"] if self.all_rows is not None else []
        without = ["--no-checksums"] if any(array.state == "not checked" for array in self.arrays) else []
        return shell_command(["oocattn", "verify", self.result, *sample, *named, *without])

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON-ready values, with what follows from them."""
        follows = {name: getattr(self, name) for name in _FOLLOWS} | {"strata": tuple(self.strata)}
        content = {name: value for name, value in to_json(self).items() if name != "files"}
        return {"format": FORMAT, **to_json(follows), **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Certificate:
        """The certificate that `to_json` wrote. Raises IntegrityError for anything else, also for another verdict."""
        try:
            found = dict(content)
            summary = {name: found.pop(name) for name in ("format", *_FOLLOWS)}
            certificate = from_json(cls, found)
            check_problem(certificate.problem)
            certificate._check_rows()
            written = certificate.to_json()
            for name, value in summary.items():
                if written[name] != value:
                    raise ValueError(f"its {name} does not follow from what it says")
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"not a certificate of oocattn: {error}") from None
        return certificate

    def _check_rows(self) -> None:
        """Raise ValueError for rows that no sample of the problem has."""
        if not self.drawn:
            raise ValueError("none of its rows was drawn at random")
        check_places(self.problem, self.rows)
        if self.all_rows is not None:
            self.all_rows.check(self.problem)

    def _line(self) -> str:
        return f"{self.outcome}, {len(self.rows):,} rows, worst error {self.worst_error:.1e}, {self.result}"

    def _table(self) -> list[tuple[str, str]]:
        return [
            ("verdict", self.verdict),
            ("result", self.result),
            ("problem", self.words),
            ("rows", f"{len(self.rows):,} recomputed, {len(self.wrong):,} wrong"),
            *([("all rows", all_rows_line(self.all_rows))] if self.all_rows is not None else []),
            ("error", error_line(self)),
            ("shown", self.statement),
            ("checksums", "; ".join(checksum_lines(self))),
            *([("weights", weights_line(self.problem, self.plan))] if self.plan is not None else []),
            ("ledger", ledger_line(self)),
            ("dataset", f"{self.dataset}, {dataset_line(self)}"),
            ("made", self.made),
        ]

    def __str__(self) -> str:
        return certificate_text(self)
