"""Making a certificate: rows, checksums and ledger, kept beside the result."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Annotated

from oocattn.errors import BudgetError, IntegrityError, OocattnError
from oocattn.naming import named
from oocattn.problem.arrays import ArrayName, weights_dtype
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Count, Excerpt, from_json
from oocattn.storage.files.operations import words_of
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.opening import InputsLike, open_again
from oocattn.storage.paths import CERTIFICATE, CERTIFICATE_PAGE, REPORT, ResultPaths
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.checksums import Checksums, read_bits, result_digest
from oocattn.storage.results.rows import RowReader, find_damage
from oocattn.storage.results.summary import ResultAttributes
from oocattn.threads import count_cores
from oocattn.units import ceil_div, format_bytes
from oocattn.verification.all_rows import MOST_KEPT, MOST_RECOMPUTED, AllRowsArrays, Sizes, check_all_rows
from oocattn.verification.attended import count_attended
from oocattn.verification.blocks import BLOCK_ROWS, LEAST_ROWS, Compared
from oocattn.verification.certificate import Certificate
from oocattn.verification.findings import ArrayCheck, Ledger
from oocattn.verification.identity import fingerprint_like
from oocattn.verification.recompute import GROUP_ROWS, KEY_ROWS, check_row, recompute_bytes, recompute_rows
from oocattn.verification.rounding import UNIT_ROUNDOFF
from oocattn.verification.text import certificate_page
from oocattn.version import versions

logger = logging.getLogger("oocattn")

MOST_THREADS = 16  # that compare rows: of more, each waits for Python's lock
MOST_COUNTED = 1 << 23  # rows of one head whose keys are counted one row after the other: about a second
LEAST_KEYS = 64  # keys of the smallest tile that K and V are streamed in
STEP_BYTES = 8 << 20
"""Read at a time for a checksum where chunks are plain files, at most: it stays in the processor's cache. Else a part is."""

LEAST_STEP_BYTES = 64 << 10  # the same, at least: below it, calls take longer than bytes
BASE_BYTES = 4 << 20  # for what does not grow with tiles and steps: Zarr's and Python's own
ROW_BYTES = 8 << 10  # for a row in the sample, in the certificate and on its page
PLACE_BYTES = 1 << 10  # for a suspected row, while it waits to be recomputed
PART_BYTES = 128  # for the checksum of a part, as it is read and parsed


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
) -> Certificate:
    """Verify a finished result, and write its certificate beside it. The arguments are those of `oocattn.verify`.

    `all_rows` is what a second pass over its pairs left: then every row is compared with that.
    """
    recorded, identity = ResultAttributes.read(paths), paths.identity()
    problem, place = recorded.problem, recorded.dataset
    opened = open_again(place, problem, "result", inputs, storage_options)
    fingerprint, readers = fingerprint_like(opened, place, str(paths.result)), _readers(problem, arrays, paths)
    bits = read_bits(paths.result)
    compared = {name: array.checksums for name, array in bits.items() if checksums and array.checksums is not None}
    second = None if all_rows is None else all_rows.beside(problem, opened, readers, recorded.plan.rounds_weights)
    sizes = _sizes(problem, opened, readers, compared, rows, host_memory, second)
    roundoff = UNIT_ROUNDOFF[weights_dtype(problem.dtype, recorded.plan.rounds_weights)]
    options = {"rows": rows, "seed": seed, "key_rows": sizes.of_rows.key_rows}
    exact = recompute_rows(problem, opened, borders=recorded.borders, weight_roundoff=roundoff, **options)
    certificate = Certificate(
        str(paths.result),
        opened.location,
        problem,
        str(problem),
        rows,
        seed,
        rows=tuple(sorted((check_row(problem, row, readers) for row in exact), key=attrgetter("batch", "head", "token"))),
        arrays=tuple(_check_array(readers[name], bits[name].checksums, sizes.steps.get(name)) for name in bits),
        digest=result_digest(bits),
        ledger=_ledger(problem, paths),
        dataset_recorded=place.fingerprint,
        dataset_found=fingerprint,
        computed_with=recorded.versions,
        verified_with=versions(),
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        tensors=opened.origins,
        plan=recorded.plan,
        all_rows=check_all_rows(second, all_rows, sizes.of_rows, roundoff) if second and all_rows else None,
    )
    if (ResultAttributes.read(paths), paths.identity()) != (recorded, identity):
        raise IntegrityError(f"{paths.result} was replaced while it was verified: verify it again")
    return _write_certificate(certificate, paths)


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


@dataclass(frozen=True)
class _Sizes:
    """What is read at a time: of rows, and of each array for checksums."""

    of_rows: Sizes
    steps: Mapping[str, int]


def _sizes(
    problem: Problem,
    dataset: Dataset,
    readers: Mapping[str, RowReader],
    compared: Mapping[str, Checksums],
    rows: int,
    host_memory: int,
    second: Compared | None,
) -> _Sizes:
    """What to read at a time within the budget. Raises BudgetError where the least does not fit."""
    rows = min(rows, problem.rows)
    always = BASE_BYTES + ROW_BYTES * rows + sum(PART_BYTES * len(checksums) for checksums in compared.values())
    always += ROW_BYTES * MOST_KEPT + PLACE_BYTES * MOST_RECOMPUTED if second is not None else 0
    one_row = max(reader.nbytes(1) for reader in readers.values())
    least: list[int] = []

    def fit(most: int, fewest: int, nbytes: Callable[[int], int]) -> int:
        size = most
        while size > fewest and always + nbytes(size) > host_memory:
            size = max(size // 2, fewest)
        least.append(always + nbytes(size))
        return size

    key_rows = fit(KEY_ROWS, LEAST_KEYS, lambda keys: one_row + recompute_bytes(problem, dataset, rows, keys))
    steps = {name: fit(*_steps(readers[name], checksums.rows), readers[name].nbytes) for name, checksums in compared.items()}
    block_rows = threads = group_rows = 0
    if second is not None:
        block_rows = fit(BLOCK_ROWS, LEAST_ROWS, partial(second.nbytes, threads=1))
        threads = fit(min(count_cores(), MOST_THREADS), 1, partial(second.nbytes, block_rows))
        group_rows = fit(GROUP_ROWS, 1, lambda rows: one_row + recompute_bytes(problem, dataset, rows, key_rows))
    if max(least) > host_memory:
        raise BudgetError(
            f"{named('host_memory')} {format_bytes(host_memory)} is too small to verify this result: the smallest that "
            f"works is {ceil_div(max(least), 1 << 20)}MiB"
        )
    return _Sizes(Sizes(block_rows, threads, key_rows, group_rows), steps)


def _steps(reader: RowReader, part: int) -> tuple[int, int]:
    """The most and the fewest rows to read at a time of an array whose parts have `part` rows."""
    row = math.prod(reader.shape[3:]) * reader.dtype.itemsize
    most = min(part, reader.shape[2], max(1, STEP_BYTES // row) if reader.mapped else part)
    return most, min(most, max(1, LEAST_STEP_BYTES // row))


def _check_array(reader: RowReader, recorded: Checksums | None, step: int | None) -> ArrayCheck:
    if recorded is None:
        return ArrayCheck(reader.name, "not recorded", 0, ())
    if step is None:
        return ArrayCheck(reader.name, "not checked", len(recorded), ())
    return ArrayCheck(reader.name, "checked", len(recorded), tuple(find_damage(reader, recorded, step)))


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
