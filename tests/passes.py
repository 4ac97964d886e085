"""Second passes as planned on a machine that is made up (their division is chosen, nothing is measured), and surveys."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import GENEROUS, GPU, MACHINE, replanned, with_partials

import oocattn
from oocattn import Plan, Survey
from oocattn.cores import Workers
from oocattn.kernels.registry import get_kernel
from oocattn.pipelines import session
from oocattn.planning.candidates import Choices, make_plan
from oocattn.planning.machine import Engine
from oocattn.planning.memory import Tiles
from oocattn.planning.reading import input_cost
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.dataset import Dataset

ARRAYS = ("received", "entropy", "top_keys", "top_weights", "pooled")
"""All that a survey adds."""


@contextmanager
def planned(
    chunks: int | None,
    decomposition: str = "cqs",
    *,
    partials: str | None = None,
    threads: int = 1,
    gpu_tiles: Tiles | None = None,
) -> Iterator[None]:
    """While inside, plans of second passes have so many chunks, this division and, where given, place of partials.

    With `gpu_tiles` they are surveys on a GPU.
    """
    kernel, real = "weights" if gpu_tiles is None else "hopper-survey", session.plan_here
    machine = replace(
        MACHINE if gpu_tiles is None else GPU,
        kernel=kernel,
        scratch_bytes=get_kernel(kernel).scratch_bytes,
        threads=threads,
    )

    def plan(
        dataset: Dataset,
        problem: Problem,
        choices: Choices,
        workers: Workers,
        scratch: Path | None,
        engine: Engine,
        *,
        to_store: bool = False,
    ) -> Plan:
        if problem.second_pass is None:
            return real(dataset, problem, choices, workers, scratch, engine, to_store=to_store)
        made = make_plan(
            problem,
            replace(machine, lanes=workers.count or 1),
            inputs=replace(input_cost(dataset, problem, host_memory=0), decode_rate=1e9),
            device_memory=GENEROUS,
            host_memory=choices.host_memory or GENEROUS,
            chunks=chunks,
            decomposition=decomposition,
            to_store=to_store,
        )
        made = made if partials is None else with_partials(made, partials)
        return made if gpu_tiles is None else replanned(made, tiles=gpu_tiles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "plan_here", plan)
        yield


def survey(result: Any, partials: str = "memory", **options: Any) -> Survey:
    """A survey in 3 x 3 chunks."""
    with planned(3, partials=partials):
        return oocattn.survey(result, **{"engine": "inline", "pool": 7, **options})


def copied(result: Path, place: Path) -> Path:
    """A result, with what is beside it, at another place."""
    for suffix in ("", ".oocattn"):
        shutil.copytree(f"{result}{suffix}", f"{place}{suffix}")
    return place


def bits(found: Survey) -> dict[str, bytes]:
    """The bits of the arrays of a survey."""
    return {name: np.asarray(array[...]).tobytes() for name, array in found.arrays.items()}
