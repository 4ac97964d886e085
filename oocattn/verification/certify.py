"""Making a certificate: rows, checksums and ledger, kept beside the result."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Annotated

from oocattn.errors import BudgetError, IntegrityError, OocattnError
from oocattn.problem.arrays import ArrayName, weights_dtype
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Count, Excerpt, from_json
from oocattn.storage.files.operations import words_of
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.opening import InputsLike, open_again
from oocattn.storage.paths import CERTIFICATE, CERTIFICATE_PAGE, REPORT, ResultPaths
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.checksums import ArrayBits, read_bits, result_digest
from oocattn.storage.results.inputs_of_run import fingerprint_like
from oocattn.storage.results.readers import result_readers
from oocattn.storage.results.rows import RowReader, find_damage
from oocattn.storage.results.summary import ResultAttributes
from oocattn.verification.all_rows import AllRowsArrays, check_all_rows
from oocattn.verification.attended import count_attended
from oocattn.verification.beside import ProcessBeside
from oocattn.verification.blocks import Compared
from oocattn.verification.budget import Fitted, Step, fit
from oocattn.verification.certificate import Certificate
from oocattn.verification.findings import ArrayCheck, Ledger
from oocattn.verification.recompute import check_row, most_key_rows, recompute_rows
from oocattn.verification.rounding import UNIT_ROUNDOFF
from oocattn.verification.text import certificate_page
from oocattn.version import versions

logger = logging.getLogger("oocattn")

MOST_COUNTED = 1 << 23  # rows of one head whose keys are counted one row after the other: about a second


@dataclass(frozen=True)
class _RunCounts(Excerpt):
    """Some of a run's report; see `Ledger`."""

    pairs: Count
    not_finite: Count
    out_not_finite: Count
    other_bits: str
    out_overflowed: Annotated[Count, ADDED] = 0
    out_underflowed: Annotated[Count, ADDED] = 0
    rows_without_keys: Annotated[Count, ADDED] = 0
    not_finite_in: Annotated[tuple[ArrayName, ...], ADDED] = ()


def certify(
    paths: ResultPaths,
    arrays: ResultArrays,
    *,
    rows: int,
    seed: int,
    inputs: InputsLike | None,
    host_memory: int,
    checksums: bool,
    storage_options: StorageOptions | None = None,
    all_rows: AllRowsArrays | None = None,
    beside: ProcessBeside[Examined | None] | None = None,
) -> Certificate:
    """Verify a finished result; its certificate is not written yet. The arguments are those of `oocattn.verify`.

    `all_rows` is what a second pass over its pairs left: then every row is compared with that. `beside` may have begun an
    `Examination` with the same arguments; where there is none, or it is of another result, the result is examined here.
    """

    def open_inputs(recorded: ResultAttributes) -> Dataset:
        return open_again(recorded.dataset, recorded.problem, "result", inputs, storage_options)

    def examine() -> Certificate:
        before = None if beside is None else beside.answer()
        if before is not None and result.is_that_of(before):
            return before.certificate
        return result.examine(rows, seed, fitted, versions())

    result = _Result.open(paths, arrays, open_inputs)
    second = None if all_rows is None else result.beside(all_rows)
    fitted = result.fit(rows, second, host_memory, checksums)
    held, found = 0 if beside is None else beside.held, None
    waits = not held or not result.compares_alike(fitted, rows, second, host_memory - held)
    certificate = examine() if waits else None
    if all_rows is not None and second is not None and fitted.all_rows is not None:
        found = check_all_rows(second, all_rows, fitted.all_rows, result.weight_roundoff)
    certificate = replace(certificate or examine(), all_rows=found)
    result.require_same()
    return certificate


@dataclass(frozen=True)
class Examined:
    """The certificate of a result without all rows, what the result recorded of itself then, and its identity."""

    certificate: Certificate
    recorded: ResultAttributes
    identity: str | None


@dataclass(frozen=True)
class Examination:
    """What another process needs to examine a result: it is opened there. Called, it returns what is found.

    `host_memory` is for that process alone. None is found where it does not give what is found with any larger one: sums
    over smaller tiles are rounded otherwise.
    """

    paths: ResultPaths
    arrays: ResultArrays
    dataset: Dataset
    rows: int
    seed: int
    checksums: bool
    host_memory: int
    verified_with: Mapping[str, str] = field(default_factory=versions)  # which there would take PyTorch to know

    @property
    def can_be_sent(self) -> bool:
        """Whether another process can read all of it: nothing is an object in the memory of this one."""
        stored, tensors = self.paths.stored, self.dataset.arrays.values()
        return all(each.origin.location for each in tensors) and (stored is None or not stored.is_of_this_process)

    def __call__(self) -> Examined | None:
        result = _Result.open(self.paths, self.arrays, lambda _: self.dataset)
        fitted = result.fit(self.rows, None, self.host_memory, self.checksums)
        problem = result.recorded.problem
        if fitted.sample.keys < most_key_rows(problem, min(self.rows, problem.rows)):
            return None
        return Examined(result.examine(self.rows, self.seed, fitted, self.verified_with), result.recorded, result.identity)


@dataclass(frozen=True)
class _Result:
    """A finished result, its inputs, and what it records of itself, as they were when they were opened."""

    paths: ResultPaths
    recorded: ResultAttributes
    identity: str | None
    dataset: Dataset
    fingerprint: str
    readers: Mapping[str, RowReader]
    bits: Mapping[str, ArrayBits]

    @classmethod
    def open(cls, paths: ResultPaths, arrays: ResultArrays, inputs: Callable[[ResultAttributes], Dataset]) -> _Result:
        """A result with its `inputs`, by what it records. Raises IntegrityError where they are not those of its run."""
        recorded, identity = ResultAttributes.read(paths), paths.identity()
        dataset = inputs(recorded)
        fingerprint = fingerprint_like(dataset, recorded.dataset, str(paths.result))
        readers = result_readers(recorded.problem, arrays, str(paths.result))
        return cls(paths, recorded, identity, dataset, fingerprint, readers, read_bits(paths.result))

    @property
    def weight_roundoff(self) -> float:
        """That of the dtype to which its kernel rounds softmax weights."""
        return UNIT_ROUNDOFF[weights_dtype(self.recorded.problem.dtype, self.recorded.plan.rounds_weights)]

    def beside(self, all_rows: AllRowsArrays) -> Compared:
        """It and a second pass. Raises IntegrityError where that is none over such a result."""
        return all_rows.beside(self.recorded.problem, self.dataset, self.readers, self.recorded.plan.rounds_weights)

    def fit(self, rows: int, second: Compared | None, host_memory: int, checksums: bool) -> Fitted:
        """What to hold at a time, to examine it and to compare it with a second pass. Raises BudgetError."""
        compared = {name: bits.checksums for name, bits in self.bits.items() if checksums and bits.checksums is not None}
        return fit(self.recorded.problem, self.dataset, self.readers, compared, rows, second, host_memory)

    def compares_alike(self, fitted: Fitted, rows: int, second: Compared | None, host_memory: int) -> bool:
        """Whether it is compared with a second pass within another budget as it is `fitted`."""
        with suppress(BudgetError):
            return self.fit(rows, second, host_memory, False).all_rows == fitted.all_rows
        return False

    def is_that_of(self, before: Examined) -> bool:
        """Whether it is the result that was examined before, and its dataset the same as far as its fingerprint tells."""
        found = before.recorded, before.identity, before.certificate.dataset_found
        return found == (self.recorded, self.identity, self.fingerprint)

    def examine(self, rows: int, seed: int, fitted: Fitted, verified_with: Mapping[str, str]) -> Certificate:
        """What a sample of rows, checksums and the report beside it show."""
        recorded, problem = self.recorded, self.recorded.problem
        exact = recompute_rows(
            problem,
            self.dataset,
            borders=recorded.borders,
            rows=rows,
            seed=seed,
            key_rows=fitted.sample.keys,
            threads=fitted.sample.threads,
            chunks=fitted.sample.chunks,
            weight_roundoff=self.weight_roundoff,
        )
        checks = [check_row(problem, row, self.readers) for row in exact]
        return Certificate(
            str(self.paths.result),
            self.dataset.location,
            problem,
            str(problem),
            rows,
            seed,
            rows=tuple(sorted(checks, key=attrgetter("batch", "head", "token"))),
            arrays=tuple(self._check_array(name, fitted.steps.get(name)) for name in self.bits),
            digest=result_digest(self.bits),
            ledger=_ledger(problem, self.paths),
            dataset_recorded=recorded.dataset.fingerprint,
            dataset_found=self.fingerprint,
            computed_with=recorded.versions,
            verified_with=verified_with,
            made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            tensors=self.dataset.origins,
            plan=recorded.plan,
        )

    def _check_array(self, name: str, step: Step | None) -> ArrayCheck:
        """The check of the checksums of an array, unless it has none, or they are not asked for."""
        recorded = self.bits[name].checksums
        if recorded is None:
            return ArrayCheck(name, "not recorded", 0, ())
        if step is None:
            return ArrayCheck(name, "not checked", len(recorded), ())
        damaged = find_damage(self.readers[name], recorded, step.rows, step.threads)
        return ArrayCheck(name, "checked", len(recorded), tuple(damaged))

    def require_same(self) -> None:
        """Raise IntegrityError where another result is there now."""
        if (ResultAttributes.read(self.paths), self.paths.identity()) != (self.recorded, self.identity):
            raise IntegrityError(f"{self.paths.result} was replaced while it was verified: verify it again")


def _ledger(problem: Problem, paths: ResultPaths) -> Ledger | None:
    """The totals in the report beside a result; None where there is no whole one.

    Expected are the pairs as the mask's definition counts them, row by row, or for very many rows by its closed forms.
    """
    try:
        counts = asdict(from_json(_RunCounts, paths.load(REPORT)))
    except (IntegrityError, ValueError):
        return None
    expected = count_attended(problem)[0] if problem.batch * problem.out_rows <= MOST_COUNTED else problem.pairs
    return Ledger(expected=expected, counted=counts.pop("pairs"), **counts)


def write_certificate(certificate: Certificate, paths: ResultPaths) -> Certificate:
    """The certificate, once it is on disk; where that cannot be, a warning says so."""
    texts = {
        CERTIFICATE_PAGE: certificate_page(certificate),
        CERTIFICATE: json.dumps(certificate.to_json(), indent=1) + "\n",
    }
    try:
        files = paths.save(texts)
    except (OSError, OocattnError) as error:
        logger.warning("the certificate was not written: %s; it is printed alone", words_of(error))
        return certificate
    return replace(certificate, files=files)
