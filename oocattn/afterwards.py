"""The public functions about a finished result: verify it, and survey what its rows attend."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from oocattn import arguments
from oocattn.api import RUN_OPTIONS, end_of, listeners_of
from oocattn.arguments import MOST_SEED, Duration, Size, checked
from oocattn.denormals import keep_denormals
from oocattn.errors import IntegrityError
from oocattn.kernels.registry import kernel_names
from oocattn.pipelines.engines import DASHBOARD, refuse_without_pass
from oocattn.pipelines.existing import result_at
from oocattn.pipelines.questions import Questions
from oocattn.pipelines.second_pass import Asked, FirstPass, second_pass
from oocattn.pipelines.survey import Survey, survey_result
from oocattn.pipelines.watch.events import Callback, Event, Started
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.host import default_host_memory
from oocattn.planning.machine import Engine
from oocattn.problem.arrays import weights_dtype
from oocattn.problem.second_pass import ARRAYS, MOST_POOLS, MOST_TOP, SecondPass
from oocattn.storage.files.operations import words_of
from oocattn.storage.inputs.opening import InputsLike, parse_inputs
from oocattn.storage.paths import ALL_ROWS, LOCKS, SURVEY, ResultLike, ResultPaths
from oocattn.storage.remote.limits import limited
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.arrays import ResultArrays

SAMPLED, SAMPLED_BESIDE_ALL = 64, 8
"""Rows that are recomputed by themselves, and where all are compared: a float64 row of a million keys takes seconds."""

logger = logging.getLogger("oocattn")

if TYPE_CHECKING:  # importing distributed takes a second: only passes do
    from distributed import Client

    from oocattn.verification.all_rows import AllRowsArrays
    from oocattn.verification.beside import ProcessBeside
    from oocattn.verification.certificate import Certificate
    from oocattn.verification.certify import Examined


@checked(
    rows=arguments.integer(1),
    seed=arguments.integer(0, MOST_SEED),
    host_memory=arguments.size,
    checksums=arguments.boolean,
    all_rows=arguments.boolean,
    kernel=arguments.choice(*kernel_names("proofs")),
    device_memory=arguments.size,
    scratch=arguments.path,
    **RUN_OPTIONS,
)
def verify(
    result: ResultLike,
    *,
    rows: int | None = None,
    seed: int = 0,
    inputs: InputsLike | None = None,
    host_memory: Size | None = None,
    checksums: bool = True,
    all_rows: bool = False,
    kernel: str | None = None,
    device_memory: Size | None = None,
    time_limit: Duration | None = None,
    engine: Engine = "dask",
    client: Client | None = None,
    dashboard_address: str = DASHBOARD,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    scratch: str | Path | None = None,
    storage_options: StorageOptions | None = None,
) -> Certificate:
    """Recompute sampled rows of a finished result in float64, compare its checksums, and write a certificate beside it.

    Of at most `rows` rows (default: 64, or 8 with `all_rows`) up to a quarter are chosen by their place, the others drawn
    uniformly, by `seed`. `host_memory` bounds what is held, in bytes (default: half of the free memory); `checksums=False`
    reads the sampled rows alone. `inputs` names them if they were moved. `all_rows` checks every row by a second pass over
    all pairs, which goes on where it was cut off; the options from `kernel` ("weights", of the CPU, or "hopper-weights") to
    `progress` are its own, as of `attention`. The certificate is kept in the folder RESULT.oocattn, or of a Zarr store in
    `scratch`; where it cannot be, a warning says so.

    Raises IntegrityError where there is no finished result, or inputs are known to be others than those of its run,
    ProblemError where the dataset is not of the result's problem and BudgetError, with the smallest budget that works.
    """
    from oocattn.pipelines.watch.full_report import renew_full_report

    budgets: Any = {"kernel": kernel, "device_memory": device_memory}
    if not all_rows:
        how = {"time_limit": time_limit, "engine": engine, "client": client, "dashboard_address": dashboard_address}
        refuse_without_pass({**budgets, **how, "callbacks": [*callbacks], "progress": progress})
    named, until = None if inputs is None else parse_inputs(inputs), end_of(time_limit)
    carrying_out = Workplace(engine, client, dashboard_address), listeners_of(callbacks, progress), until
    rows = rows or (SAMPLED_BESIDE_ALL if all_rows else SAMPLED)
    chosen: Any = {"rows": rows, "seed": seed, "checksums": checksums, "storage_options": storage_options, "inputs": named}
    proof = Asked(SecondPass(seed), ALL_ROWS, other=True, **budgets) if all_rows else None
    with limited(until):
        paths = ResultPaths.at(result, scratch, storage_options=storage_options)
        certificate = _certify(paths, chosen, cast("int | None", host_memory), proof, carrying_out)
    if certificate.files:
        renew_full_report(paths)
    return certificate


_CarryingOut = tuple[Workplace, Sequence[Callback], float]


def _certify(
    paths: ResultPaths, chosen: Any, host_memory: int | None, proof: Asked | None, carrying_out: _CarryingOut
) -> Certificate:
    """Verify a result with what was chosen of `verify`, after a proof of every row where one is asked for."""
    from oocattn.verification.beside import ProcessBeside  # `plan` needs neither
    from oocattn.verification.certify import Examined, certify, write_certificate

    found = result_at(paths)
    arrays = ResultArrays(found.out, found.lse)
    budget = default_host_memory() if host_memory is None else host_memory
    verified = partial(certify, paths, arrays, host_memory=budget, **chosen)
    if proof is None:
        with keep_denormals():
            return write_certificate(verified(), paths)
    first = FirstPass.open(paths, arrays, chosen["inputs"], chosen["storage_options"])
    with ProcessBeside[Examined | None]() as beside, ExitStack() as passes:
        listener = _examine_meanwhile(beside, first, chosen, budget)
        try:
            compared = passes.enter_context(_every_row(first, proof, host_memory, carrying_out, listener))
        except IntegrityError as error:
            damage = error
        else:
            with keep_denormals():
                return write_certificate(verified(all_rows=compared, beside=beside), paths)
    with keep_denormals():  # without lse, which may be what is damaged, there are no weights
        certificate = verified()
    if not certificate.failed:
        raise damage
    logger.warning("not every row was compared: %s", words_of(damage))
    return write_certificate(certificate, paths)


def _examine_meanwhile(beside: ProcessBeside[Examined | None], first: FirstPass, chosen: Any, budget: int) -> Callback:
    """A listener to a second pass that has the result examined `beside` it, in half of the host memory that it leaves.

    The other half is for comparing all rows, which may begin before that ends.
    """
    from oocattn.verification.beside import PROCESS_BYTES
    from oocattn.verification.certify import Examination

    numbers = {name: chosen[name] for name in ("rows", "seed", "checksums")}

    def begin(event: Event) -> None:
        if isinstance(event, Started) and is_worth_a_process(event):
            room = (budget - event.plan.peak_host - PROCESS_BYTES) // 2
            asked = Examination(first.paths, first.arrays, first.dataset, host_memory=room, **numbers)
            if room > 0 and asked.can_be_sent:
                beside.begin(asked, room)

    return begin


def is_worth_a_process(started: Started) -> bool:
    """Whether rows are sampled in a process of their own beside a second pass.

    They are where GPUs compute it, which leaves cores idle, and for longer than a process needs to come up.
    """
    from oocattn.verification.beside import PROCESS_SECONDS

    plan = started.plan
    seconds = plan.seconds * started.pairs_left / max(1, plan.problem.pairs)
    return plan.device == "cuda" and seconds > PROCESS_SECONDS


@contextmanager
def _every_row(
    first: FirstPass, proof: Asked, host_memory: int | None, carrying_out: _CarryingOut, listener: Callback
) -> Iterator[AllRowsArrays]:
    """What a second pass over a result leaves, to be judged while inside; with one more `listener`."""
    from oocattn.verification.all_rows import AllRowsArrays

    seed = proof.second_pass.seed
    assert seed is not None
    workplace, callbacks, until = carrying_out
    with second_pass(first, proof, host_memory, workplace, [*callbacks, listener], until) as second:
        rounds = weights_dtype(first.problem.dtype, second.plan.rounds_weights) != "float32"
        yield AllRowsArrays(second.arrays, second.location, seed, second.computed_by, second.is_other(first), rounds)


@checked(
    arrays=arguments.choices(*ARRAYS),
    top=arguments.integer(1, MOST_TOP),
    pool=arguments.integer(1, MOST_POOLS),
    mean_heads=arguments.boolean,
    host_memory=arguments.size,
    kernel=arguments.choice(*kernel_names("surveys")),
    device_memory=arguments.size,
    overwrite=arguments.boolean,
    scratch=arguments.path,
    lock=arguments.choice(*LOCKS),
    **RUN_OPTIONS,
)
def survey(
    result: ResultLike,
    *,
    arrays: Sequence[str] = ARRAYS,
    top: int = 8,
    pool: int = 1024,
    mean_heads: bool = False,
    inputs: InputsLike | None = None,
    host_memory: Size | None = None,
    kernel: str | None = None,
    device_memory: Size | None = None,
    overwrite: bool = False,
    time_limit: Duration | None = None,
    engine: Engine = "dask",
    client: Client | None = None,
    dashboard_address: str = DASHBOARD,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    scratch: str | Path | None = None,
    lock: str = "auto",
    storage_options: StorageOptions | None = None,
) -> Survey:
    """Add to a finished result what its rows attend, by a second pass over all pairs, on Hopper GPUs or the CPU.

    The weights are P_ij = exp(s_ij - lse_i). Of `arrays`: `received` [B, Hq, Nk], the sum of the weights that a key
    receives; `entropy` [B, Hq, N] of each row's weights, in nats; `top_keys` [B, Hq, N, k] with `top_weights`, the `top` = k
    largest of each row, falling (-1 and 0 where it attends fewer; equal weights in any order); `pooled` [B, Hq, R, C],
    weights summed over blocks of rows and keys, at most `pool` along each side, averaged over heads with `mean_heads`
    [B, 1, R, C]. All are float32, `top_keys` int64. They are written into the result's group, each whole; those of an
    earlier survey are replaced with `overwrite`. A learnable sink counts as a weight that no key receives.

    A pass that was cut off goes on when the same is asked for again. Another survey is refused until then, unless
    `overwrite` throws that pass away. `inputs` names them if they were moved, `host_memory` and `device_memory` bound what
    is held (default: half of the free memory), `kernel` is "weights", of the CPU, or "hopper-survey", and the options from
    `time_limit` to `lock` are those of `attention`. Raises IntegrityError where there is no finished result, inputs are
    known to be others than those of its run, or arrays that are there have lost chunks, ResultExistsError where it has such
    an array, or the pass of another survey, ProblemError where the dataset is not of the result's problem or the kernel does
    not serve, and BudgetError.
    """
    named, until = None if inputs is None else parse_inputs(inputs), end_of(time_limit)
    carrying_out = Workplace(engine, client, dashboard_address), listeners_of(callbacks, progress), until
    with limited(until):
        paths = ResultPaths.at(result, scratch, lock, storage_options)
        found = result_at(paths)
        first = FirstPass.open(paths, ResultArrays(found.out, found.lse), named, storage_options)
        reduced = Questions(tuple(arrays), top, pool).reduced(first.problem)
        budgets: Any = {"kernel": kernel, "device_memory": device_memory}
        asked = Asked(SecondPass(reduced=reduced), SURVEY, keep=not overwrite, **budgets)
        return survey_result(first, asked, cast("int | None", host_memory), carrying_out, mean_heads=mean_heads)
