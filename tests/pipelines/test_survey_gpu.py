"""A survey on a GPU: it is computed there, has what the CPU's has, and goes on to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupting import EnoughError, interrupt
from passes import bits

import oocattn
from oocattn import Survey
from oocattn.kernels.registry import second_pass_kernel
from oocattn.pipelines import second_pass, session
from oocattn.planning.plan import Plan
from oocattn.storage.bfloat16 import numpy_dtype

pytestmark = pytest.mark.gpu

TOKENS = 5000


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if second_pass_kernel("surveys", "cuda", "float16", 64, 64) != "hopper-survey":
        pytest.skip("no Hopper GPU")


@contextmanager
def noted(*, one: bool = False, **chosen: Any) -> Iterator[list[Plan]]:
    """The plans of the passes inside, as they are chosen; with `one` all are the first, for measured rates vary."""
    plans, real = list[Plan](), session.plan_here

    def plan(dataset: Any, problem: Any, choices: Any, *others: Any, **options: Any) -> Plan:
        again = one and bool(plans)
        plans.append(plans[0] if again else real(dataset, problem, replace(choices, **chosen), *others, **options))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "plan_here", plan)
        yield plans


def attend(folder: Path, dtype: str, **asked: Any) -> tuple[Path, dict[str, Any]]:
    """A result of four query heads and two key heads, and its inputs."""
    rng = np.random.default_rng(3)
    shapes = {"q": (1, 4, TOKENS, 64), "k": (1, 2, TOKENS, 64), "v": (1, 2, TOKENS, 64)}
    inputs = {name: rng.standard_normal(shape).astype(numpy_dtype(dtype)) for name, shape in shapes.items()}
    oocattn.attention(inputs, folder / "result.zarr", engine="inline", **asked)
    return folder / "result.zarr", inputs


def survey(result: Path, inputs: dict[str, Any], **options: Any) -> Survey:
    return oocattn.survey(result, inputs=inputs, engine="inline", overwrite=True, pool=700, **options)


def compare(found: Survey, right: Survey) -> None:
    """Compare two surveys of float32 weights; of close ones the top keys may differ.

    The entropy of a row with one key is 0, plus the rounding of its score and log-sum-exp in float32.
    """
    one, other = ({name: np.asarray(array[...]) for name, array in each.arrays.items()} for each in (found, right))
    for name in ("received", "entropy", "pooled", "top_weights"):
        atol = 1e-6 if name == "entropy" else 1e-9
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=atol, err_msg=name)
    assert (one["top_keys"] == other["top_keys"]).mean() > 0.999


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        ("float16", {"causal": True}),
        ("float16", {}),
        ("bfloat16", {"window_size": (700, 300), "sink_tokens": 4}),
        ("float32", {"causal": True, "softcap": 20.0}),
        ("float16", {"causal": True, "alibi_slopes": np.array([0.5, 0.01, 0.1, 0.02], np.float32)}),
        ("float16", {"cu_seqlens_q": [0, 100, 2100, TOKENS], "cu_seqlens_k": [0, 900, 1100, TOKENS], "precise": True}),
        ("float16", {"queries": (1234, 4321), "causal": True, "heads": [0, 3]}),
    ],
    ids=str,
)
def test_a_gpu_s_survey_has_what_a_cpu_s_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, asked: dict[str, Any]
) -> None:
    result, inputs = attend(tmp_path, dtype, **asked)
    with noted(chunks=3) as plans:
        found = survey(result, inputs)
        first = {name: np.asarray(array[...]) for name, array in found.arrays.items()}
        monkeypatch.setattr(second_pass, "choose_device", lambda _: "cpu")
        right = survey(result, inputs)
    assert [plan.kernel for plan in plans] == ["hopper-survey", "weights"]
    compare(Survey(found.path, first), right)  # type: ignore[arg-type]


@pytest.mark.parametrize("division", ["cqs", "strips"])
def test_a_survey_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path, division: str) -> None:
    result, inputs = attend(tmp_path, "float16", causal=True)
    with noted(one=True, chunks=7, decomposition=division, device_memory=256 << 20) as plans:
        right = bits(survey(result, inputs))
        assert bits(survey(result, inputs)) == right
        for kind, count in (("attended", 2), ("attended", 9), ("written", 4)):
            with pytest.raises(EnoughError):
                survey(result, inputs, callbacks=[interrupt(kind, count)])
            assert bits(survey(result, inputs)) == right
    assert plans[0].kernel == "hopper-survey"


def test_a_survey_keeps_to_the_memory_that_is_planned(tmp_path: Path) -> None:
    result, inputs = attend(tmp_path, "float32", causal=True)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with noted() as plans:
        survey(result, inputs, top=64)
    assert torch.cuda.max_memory_reserved() - before <= plans[0].peak_device
