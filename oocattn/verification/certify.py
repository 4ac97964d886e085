"""How a certificate comes about: rows recomputed, checksums compared, the ledger's totals, and all of it kept beside the
result.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, nan
from pathlib import Path

import numpy as np

from oocattn.errors import BudgetError, IntegrityError
from oocattn.pipelines.watch.report import RunReport
from oocattn.problem.problem import Problem, read_problem
from oocattn.records import Positive, from_json
from oocattn.storage.files.durable import read_json, write_text
from oocattn.storage.files.folders import is_folder
from oocattn.storage.files.operations import words_of
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.posing import check_poses
from oocattn.storage.paths import ResultPaths, identity_at
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.checksums import Checksums, find_damage, recorded_checksums, result_digest
from oocattn.storage.results.rows import RowReader
from oocattn.text import printable
from oocattn.units import format_bytes
from oocattn.verification.certificate import Certificate, Summary
from oocattn.verification.findings import ArrayCheck, Ledger, RowCheck
from oocattn.verification.page import certificate_page
from oocattn.verification.recompute import KEY_ROWS, ExactRow, compare_row, recompute_bytes, recompute_rows
from oocattn.verification.rounding import UNIT_ROUNDOFF
from oocattn.version import versions

logger = logging.getLogger("oocattn")

LEAST_KEYS = 64
"""Keys of the smallest tile that K and V are streamed in."""

STEP_BYTES = 8 << 20
"""Read at a time for a checksum where chunks are plain files, at most: it stays in the processor's cache. Else a part is."""

LEAST_STEP_BYTES = 64 << 10
"""The same, at least: below it, calls take longer than bytes."""

BASE_BYTES = 4 << 20
"""For what does not grow with tiles and steps: Zarr's and Python's own."""

ROW_BYTES = 8 << 10
"""For a row in the sample, in the certificate and on its page."""

PART_BYTES = 128
"""For the checksum of a part, as it is read and parsed."""


@dataclass(frozen=True)
class _Source:
    """The attribute `dataset` of a result."""

    location: str
    fingerprint: str


@dataclass(frozen=True)
class _Decided:
    """What is needed of the attribute `plan`."""

    chunk_rows: Positive
    kernel: str
    rounds_weights: bool = True  # which allows more, where an older version has not recorded it


@dataclass(frozen=True)
class _MadeBy:
    """The attribute `versions`."""

    versions: Mapping[str, str]


@dataclass(frozen=True)
class Recorded:
    """What a result says of itself in its attributes."""

    problem: Problem
    location: str
    fingerprint: str
    chunk_rows: int
    kernel: str
    rounds_weights: bool
    versions: Mapping[str, str]

    @property
    def borders(self) -> Sequence[int]:
        """The first tokens of all chunks but one."""
        return range(self.chunk_rows, self.problem.tokens, self.chunk_rows)

    @classmethod
    def of(cls, paths: ResultPaths) -> Recorded:
        """Of the result at a path. Raises IntegrityError where that is no result of ours."""
        attributes = paths.attributes() or {}
        try:
            source = from_json(_Source, attributes["dataset"])
            plan = from_json(_Decided, _needed(attributes["plan"]), may_lack=("rounds_weights",))
            made_by = from_json(_MadeBy, {"versions": attributes["versions"]}).versions
            problem = read_problem(attributes["problem"])
        except (KeyError, TypeError, ValueError) as error:
            reason = printable(f"lacking {error}" if isinstance(error, KeyError) else error)
            raise IntegrityError(f"{paths.result}: the attributes do not describe a result of oocattn ({reason})") from None
        return cls(problem, source.location, source.fingerprint, plan.chunk_rows, plan.kernel, plan.rounds_weights, made_by)

    @property
    def weight_roundoff(self) -> float:
        """The unit roundoff of the dtype that the kernel keeps softmax weights in: the matrix units of GPUs take 16 bits."""
        return UNIT_ROUNDOFF[self.problem.dtype if self.rounds_weights else "float32"]


def _needed(plan: Mapping[str, object]) -> dict[str, object]:
    """What is needed of the attribute `plan`."""
    return {field.name: plan[field.name] for field in fields(_Decided) if field.name in plan}


def certify(
    paths: ResultPaths,
    arrays: ResultArrays,
    report: RunReport | None,
    *,
    rows: int,
    seed: int,
    dataset: str | Path | None,
    host_memory: int,
    checksums: bool,
) -> Certificate:
    """Verify a finished result, and write its certificate beside it. The arguments are those of `oocattn.verify`."""
    recorded, identity = Recorded.of(paths), identity_at(paths.result)
    problem, opened = recorded.problem, Dataset.open_recorded(recorded.location, dataset)
    check_poses(opened, problem, "result")
    readers = _readers(problem, arrays, paths)
    recorded_bits = {name: recorded_checksums(array) for name, array in arrays.by_name.items()}
    compared = {name: found for name, found in recorded_bits.items() if checksums and found is not None}
    sizes = _sizes(problem, opened, readers, compared, rows, host_memory)
    exact = recompute_rows(
        problem,
        opened,
        borders=recorded.borders,
        rows=rows,
        seed=seed,
        key_rows=sizes.key_rows,
        weight_roundoff=recorded.weight_roundoff,
    )
    certificate = Certificate(
        str(paths.result),
        opened.location,
        problem,
        rows,
        seed,
        rows=tuple(_check_row(problem, row, readers) for row in exact),
        arrays=tuple(_check_array(readers[name], found, sizes.steps.get(name)) for name, found in recorded_bits.items()),
        digest=_digest(arrays, recorded_bits),
        ledger=None if report is None else _ledger(problem, report),
        dataset_recorded=recorded.fingerprint,
        dataset_found=opened.fingerprint(),
        computed_with=recorded.versions,
        verified_with=versions(),
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    if (Recorded.of(paths), identity_at(paths.result)) != (recorded, identity):
        raise IntegrityError(f"{paths.result} was replaced while it was verified: verify it again")
    return _kept(certificate, paths)


def read_summary(paths: ResultPaths) -> Summary | None:
    """Of the certificate beside a finished result; None where there is none, or it is of a result that was replaced since.

    A warning says that one is damaged, and no more is said of it.
    """
    try:
        content = read_json(paths.certificate) if is_folder(paths.state) else None
        if content is None:
            return None
        found, recorded, arrays = Summary.from_json(content), Recorded.of(paths), ResultArrays.open(paths.result)
        bits = _digest(arrays, {name: recorded_checksums(array) for name, array in arrays.by_name.items()})
    except (IntegrityError, OSError) as error:
        logger.warning("the certificate beside %s cannot be read (%s): verify the result again", paths.result, error)
        return None
    of = (found.digest, found.problem, found.dataset_recorded)
    return found if of == (bits, recorded.problem, recorded.fingerprint) else None


def _ledger(problem: Problem, report: RunReport) -> Ledger:
    """What the report of the run says."""
    return Ledger(
        problem.pairs,
        report.pairs,
        report.not_finite,
        report.out_not_finite,
        report.out_overflowed,
        report.out_underflowed,
        report.other_bits,
    )


def _readers(problem: Problem, arrays: ResultArrays, paths: ResultPaths) -> dict[str, RowReader]:
    """Of `out` and `lse`. Raises IntegrityError where they are not the arrays of such a problem."""
    shape = (problem.batch, problem.query_heads, problem.tokens, problem.head_dim)
    expected = {"out": (shape, problem.out_dtype), "lse": (shape[:3], "float32")}
    for name, array in arrays.by_name.items():
        found = (array.shape, array.dtype.name)
        if found != expected[name]:
            raise IntegrityError(
                f"array {name!r} of {paths.result} is {found[1]} {list(found[0])}: expected {expected[name][1]} "
                f"{list(expected[name][0])}, as its attributes say"
            )
    return {name: RowReader(name, array, str(paths.result)) for name, array in arrays.by_name.items()}


@dataclass(frozen=True)
class _Sizes:
    """What is read at a time: keys of K and V, and rows of the arrays whose checksums are compared."""

    key_rows: int
    steps: Mapping[str, int]


def _sizes(
    problem: Problem,
    dataset: Dataset,
    readers: Mapping[str, RowReader],
    compared: Mapping[str, Checksums],
    rows: int,
    host_memory: int,
) -> _Sizes:
    """The largest that fit the budget, one after another. Raises BudgetError where the smallest do not."""
    rows = min(rows, problem.rows)
    always = BASE_BYTES + ROW_BYTES * rows + sum(PART_BYTES * len(checksums) for checksums in compared.values())
    one_row = max(reader.nbytes(1) for reader in readers.values())
    least: list[int] = []

    def fit(most: int, fewest: int, nbytes: Callable[[int], int]) -> int:
        size = most
        while size > fewest and always + nbytes(size) > host_memory:
            size = max(size // 2, fewest)
        least.append(always + nbytes(size))
        return size

    key_rows = fit(KEY_ROWS, LEAST_KEYS, lambda keys: one_row + recompute_bytes(problem, dataset, rows, keys))
    steps = {name: fit(*_steps(readers[name], of.rows), readers[name].nbytes) for name, of in compared.items()}
    if max(least) > host_memory:
        raise BudgetError(
            f"--host-memory {format_bytes(host_memory)} is too small to verify this result: the smallest that works is "
            f"{-(-max(least) // (1 << 20))}MiB"
        )
    return _Sizes(key_rows, steps)


def _steps(reader: RowReader, part: int) -> tuple[int, int]:
    """The most and the fewest rows of an array that are read at a time, of parts of so many."""
    row = math.prod(reader.shape[3:]) * reader.dtype.itemsize
    most = min(part, reader.shape[2], max(1, STEP_BYTES // row) if reader.mapped else part)
    return most, min(most, max(1, LEAST_STEP_BYTES // row))


def _check_row(problem: Problem, exact: ExactRow, readers: Mapping[str, RowReader]) -> RowCheck:
    """The check of a row; one that cannot be read is wrong, whatever it should be."""
    found = {name: np.empty((1, *reader.shape[3:]), reader.dtype) for name, reader in readers.items()}
    try:
        for name, reader in readers.items():
            reader.read(exact.batch, exact.head, exact.token, found[name])
    except IntegrityError:
        as_if = compare_row(problem, exact, exact.out, exact.lse)
        return replace(as_if, error=nan, lse_error=nan, ulps=inf, mean_ulps=inf, lse_ulps=inf)
    return compare_row(problem, exact, found["out"][0].astype(np.float64), float(found["lse"][0]))


def _check_array(reader: RowReader, recorded: Checksums | None, step: int | None) -> ArrayCheck:
    if recorded is None:
        return ArrayCheck(reader.name, "not recorded", 0, ())
    if step is None:
        return ArrayCheck(reader.name, "not checked", len(recorded), ())
    return ArrayCheck(reader.name, "checked", len(recorded), tuple(find_damage(reader, recorded, step)))


def _digest(arrays: ResultArrays, recorded: Mapping[str, Checksums | None]) -> str | None:
    known = {name: checksums for name, checksums in recorded.items() if checksums is not None}
    return result_digest(arrays.by_name, known) if len(known) == len(recorded) else None


def _kept(certificate: Certificate, paths: ResultPaths) -> Certificate:
    """The certificate, once it is on disk; where that cannot be, a warning says so."""
    files = {
        paths.certificate_page: certificate_page(certificate),
        paths.certificate: json.dumps(certificate.to_json(), indent=1) + "\n",
    }
    try:
        paths.make_state()
        for path, text in files.items():
            write_text(path, text)
    except (OSError, IntegrityError) as error:
        logger.warning("the certificate was not written: %s", words_of(error))
        return certificate
    return replace(certificate, files=tuple(map(str, files)))
