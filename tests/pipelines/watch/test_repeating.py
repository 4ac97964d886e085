"""The command that a report shows computes the same result again."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import normal_arrays, plan_for, run_of, write_dataset
from zarr.storage import MemoryStore

import oocattn
from oocattn.cli.main import _COMMANDS as COMMANDS
from oocattn.cli.options import make_parser
from oocattn.pipelines.watch.repeating import planned_of
from oocattn.problem.recorded import RecordedCall
from oocattn.problem_arguments import PROBLEM_OPTIONS


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"causal": True, "window_size": (40, None), "sink_tokens": 3},
        {"key_bias": False},
        {"window_size": (None, 7), "prefix": 9, "softcap": 30.0, "scale": 0.1},
        {"queries": (20, 100), "heads": (1,), "out_dtype": "float16"},
        {"cu_seqlens_q": [0, 50, 130], "alibi_slopes": [-0.25, 0.1], "learnable_sink": [-1.0, 0.5]},
    ],
    ids=str,
)
def test_the_command_of_a_report_poses_the_same_problem(fast_path: Path, asked: dict[str, Any]) -> None:
    dataset = fast_path / "dataset.zarr"
    write_dataset(dataset, normal_arrays(130), key_bias=np.zeros((1, 2, 130), np.float32))
    zarr.open_group(dataset).attrs.update(RecordedCall(0.7, 3.0, True, (4, None)).attributes())  # which it may not ask
    run = run_of(fast_path, plan_for(dataset, chunks=7, **asked))
    words = shlex.split(planned_of(run).command, comments=True)[1:]
    options = vars(make_parser(COMMANDS).parse_args(words))
    given = {name: options[name] for name in (*PROBLEM_OPTIONS, "chunks", "decomposition", "host_memory")}
    again = oocattn.plan(options["dataset"], **given, kernel=options["kernel"], engine="inline")
    assert again.problem == run.plan.problem
    assert replace(again.pins, span=run.plan.span) == run.plan.pins  # which no option pins
    assert (options["dataset"], options["result"]) == (str(dataset), str(run.paths.result))


def test_the_command_of_a_report_names_no_inputs_that_only_their_caller_had(fast_path: Path) -> None:
    group, result = zarr.open_group(MemoryStore()), MemoryStore()
    for name, array in zip("qkv", normal_arrays(40), strict=True):
        group.create_array(name, data=array)
    oocattn.attention(group, result, engine="inline", chunks=3, scratch=fast_path / "state", lock="none")
    command, _, note = oocattn.report(result).command.partition("  # ")
    assert command.startswith("oocattn run RESULT --chunks 3 ")
    assert "inputs were of the caller's process" in note
