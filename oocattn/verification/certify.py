"""Making a certificate: rows, checksums and ledger, kept beside the result."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Annotated, ParamSpec, TypeVar

from oocattn.denormals import keep_denormals
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
from oocattn.storage.results.rows import RowReader, find_damage
from oocattn.storage.results.summary import ResultAttributes
from oocattn.threads import begin_call
from oocattn.verification.all_rows import MOST_RECOMPUTED, AllRowsArrays, check_all_rows
from oocattn.verification.attended import count_attended
from oocattn.verification.blocks import Compared
from oocattn.verification.budget import Fitted, Step, fit, fit_beside
from oocattn.verification.certificate import Certificate
from oocattn.verification.findings import ArrayCheck, Ledger
from oocattn.verification.identity import fingerprint_like
from oocattn.verification.recompute import check_row, recompute_rows
from oocattn.verification.rounding import UNIT_ROUNDOFF
from oocattn.verification.scan import Comparison, WrittenRows
from oocattn.verification.text import certificate_page
from oocattn.version import versions

logger = logging.getLogger("oocattn")

P = ParamSpec("P")
T = TypeVar("T")

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
    beforehand: Beforehand | None = None,
) -> Certificate:
    """Verify a finished result, and write its certificate beside it. The arguments are those of `oocattn.verify`.

    `all_rows` is what a second pass over its pairs left: then every row is compared with that. What was examined and
    compared `beforehand`, as the same arguments ask, is not examined again.
    """
    before = beforehand.found() if beforehand is not None else _Found()
    result = before.result or _Result.open(paths, arrays, inputs, storage_options)
    second = None if all_rows is None else result.beside(all_rows)
    fitted = result.fit(rows, second, host_memory, checksums)
    certificate = before.certificate or result.examine(rows, seed, fitted)
    if all_rows is not None and second is not None and fitted.all_rows is not None:
        found = check_all_rows(second, all_rows, fitted.all_rows, result.weight_roundoff, before.comparison)
        certificate = replace(certificate, all_rows=found)
    result.require_same()
    return _write_certificate(certificate, paths)


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
    def open(
        cls, paths: ResultPaths, arrays: ResultArrays, inputs: InputsLike | None, storage_options: StorageOptions | None
    ) -> _Result:
        recorded, identity = ResultAttributes.read(paths), paths.identity()
        dataset = open_again(recorded.dataset, recorded.problem, "result", inputs, storage_options)
        fingerprint = fingerprint_like(dataset, recorded.dataset, str(paths.result))
        readers = _readers(recorded.problem, arrays, paths)
        return cls(paths, recorded, identity, dataset, fingerprint, readers, read_bits(paths.result))

    @property
    def weight_roundoff(self) -> float:
        """That of the dtype to which its kernel rounds softmax weights."""
        return UNIT_ROUNDOFF[weights_dtype(self.recorded.problem.dtype, self.recorded.plan.rounds_weights)]

    def beside(self, all_rows: AllRowsArrays) -> Compared:
        """It and a second pass. Raises IntegrityError where that is none over such a result."""
        return all_rows.beside(self.recorded.problem, self.dataset, self.readers, self.recorded.plan.rounds_weights)

    def fit(
        self, rows: int, second: Compared | None, host_memory: int, checksums: bool, most_threads: int | None = None
    ) -> Fitted:
        """What to hold at a time, to examine it and to compare it with a second pass. Raises BudgetError."""
        compared = {name: bits.checksums for name, bits in self.bits.items() if checksums and bits.checksums is not None}
        return fit(self.recorded.problem, self.dataset, self.readers, compared, rows, second, host_memory, most_threads)

    def examine(self, rows: int, seed: int, fitted: Fitted, stop: threading.Event | None = None) -> Certificate:
        """What a sample of rows, checksums and the report beside it show. Raises StoppedError when it is to stop."""
        recorded, problem = self.recorded, self.recorded.problem
        exact = recompute_rows(
            problem,
            self.dataset,
            borders=recorded.borders,
            rows=rows,
            seed=seed,
            key_rows=fitted.sample.keys,
            threads=fitted.sample.threads,
            weight_roundoff=self.weight_roundoff,
            stop=stop,
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
            verified_with=versions(),
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


@dataclass(frozen=True)
class _Found:
    """What was found beforehand: a result as it was opened, its certificate without all rows, rows that were compared."""

    result: _Result | None = None
    certificate: Certificate | None = None
    comparison: Comparison | None = None


class Beforehand:
    """Examines a result in other threads while a second pass over it is computed, and compares rows as these are `written`.

    The arguments are those of `certify`.
    """

    def __init__(
        self,
        paths: ResultPaths,
        arrays: ResultArrays,
        *,
        rows: int,
        seed: int,
        inputs: InputsLike | None,
        host_memory: int,
        checksums: bool,
        storage_options: StorageOptions | None,
    ) -> None:
        self.written = WrittenRows()
        self._open = partial(_Result.open, paths, arrays, inputs, storage_options)
        self._rows, self._seed, self._host_memory, self._checksums = rows, seed, host_memory, checksums
        self._stop, self._context = threading.Event(), copy_context()  # in which requests have a time limit
        self._begun: tuple[Future[_Result], Future[Certificate | None], Future[Comparison | None]] | None = None

    def begin(self, host_memory: int, most_threads: int, growing: Callable[[], AllRowsArrays]) -> None:
        """Begin, once at most, with so many bytes and threads. `growing` opens what there will be of the pass.

        What the bytes are too few for is not done.
        """
        if self._begun is None:
            half, opened = max(0, host_memory) // 2, self._call(self._open)
            examined = self._call(self._examine, opened, half, most_threads)
            self._begun = opened, examined, self._call(self._compare, opened, half, max(1, most_threads // 2), growing)

    def found(self) -> _Found:
        """What was found, when the pass is done. Raises as `certify`."""
        if self._begun is None:
            return _Found()
        self.written.end()
        opened, examined, compared = self._begun
        return _Found(opened.result(), examined.result(), compared.result())

    def close(self) -> None:
        """Stop: what is found is not needed."""
        self._stop.set()
        self.written.end()

    def _call(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        return begin_call(partial(self._context.copy().run, function, *arguments, **options))

    def _examine(self, opened: Future[_Result], host_memory: int, most_threads: int) -> Certificate | None:
        result = opened.result()
        with suppress(BudgetError), keep_denormals():
            fitted = result.fit(self._rows, None, host_memory, self._checksums, most_threads)
            return result.examine(self._rows, self._seed, fitted, self._stop)
        return None

    def _compare(
        self, opened: Future[_Result], host_memory: int, most_threads: int, growing: Callable[[], AllRowsArrays]
    ) -> Comparison | None:
        """Compare rows as they are written; those that cannot be read are left, for the pass may end or move at any time."""
        result, comparison = opened.result(), None
        with suppress(OocattnError, OSError), keep_denormals():
            second = result.beside(growing())
            sizes = result.fit(self._rows, second, self._host_memory, self._checksums).all_rows
            assert sizes is not None
            if threads := fit_beside(second, sizes.block_rows, host_memory, most_threads):
                comparison = Comparison(second.problem, sizes.block_rows, MOST_RECOMPUTED)
                blocks = self.written.blocks(sizes.block_rows, second.problem.out_rows)
                comparison.compare_written(second, threads, blocks)
        return comparison


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


def _readers(problem: Problem, arrays: ResultArrays, paths: ResultPaths) -> dict[str, RowReader]:
    """The readers of `out` and `lse`. Raises IntegrityError where they are not the arrays of such a problem."""
    shape = problem.out_shape
    expected = {"out": (shape, problem.out_dtype), "lse": (shape[:3], "float32")}
    for name, array in arrays.by_name.items():
        found = (array.shape, array.dtype.name)
        if found != expected[name]:
            raise IntegrityError(
                f"array {name!r} of {paths.result} is {found[1]} {list(found[0])}: expected {expected[name][1]} "
                f"{list(expected[name][0])}, as its attributes say"
            )
    return {name: RowReader(name, array, str(paths.result)) for name, array in arrays.by_name.items()}


def _write_certificate(certificate: Certificate, paths: ResultPaths) -> Certificate:
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
