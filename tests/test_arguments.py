"""Every option of every public function takes what it is said to take; anything else is refused by name, before anything
is opened or written."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn import ProblemError
from oocattn.arguments import dtype
from oocattn.bench import bench
from oocattn.cli.main import main
from oocattn.problem.arrays import DTYPES

PUBLIC: dict[Callable[..., Any], tuple[str, ...]] = {
    oocattn.plan: ("no.zarr",),
    oocattn.attention: ("no.zarr", "out.zarr"),
    oocattn.resume: ("out.zarr",),
    oocattn.verify: ("out.zarr",),
    oocattn.synthesise: ("new.zarr",),
    oocattn.import_arrays: ("new.zarr",),
    bench: ("no",),
}
"""Functions whose keyword arguments are options, and paths for them: nothing is at any."""

LOCATIONS = {"inputs", "storage_options", "result", "client", "q", "k", "v"}
"""Keyword arguments that are no options. Nor is the bias that is imported."""

REQUIRED: dict[Callable[..., Any], dict[str, Any]] = {
    oocattn.synthesise: {"tokens": 8, "heads": 1, "head_dim": 4, "dtype": "float32"},
    oocattn.import_arrays: {"q": "no.npy", "k": "no.npy", "v": "no.npy"},
}


def options_of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    others = LOCATIONS | ({"key_bias"} if function is oocattn.import_arrays else set())
    return [found.name for found in parameters if found.kind is found.KEYWORD_ONLY and found.name not in others]


NO_DATA = torch.empty((), device="meta")

EVERY_OPTION = [
    pytest.param(function, name, id=f"{function.__name__}-{name}") for function in PUBLIC for name in options_of(function)
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fast_path)


def call(function: Callable[..., Any], **options: Any) -> Any:
    return function(*PUBLIC[function], **{**REQUIRED.get(function, {}), **options})


@pytest.mark.parametrize(("function", "name"), EVERY_OPTION)
@pytest.mark.parametrize(
    "value", [object(), 1j, [[]], b"1", np.zeros((1, 1, 2)), NO_DATA], ids=lambda found: type(found).__name__
)
def test_an_option_of_no_type_that_it_takes_is_refused_by_name(
    function: Callable[..., Any], name: str, value: object, fast_path: Path
) -> None:
    with pytest.raises(ProblemError, match=rf"^{name} = .*: expected "):
        call(function, **{name: value})
    assert not list(fast_path.iterdir())


@pytest.mark.parametrize(("function", "name"), EVERY_OPTION)
def test_none_is_taken_where_it_is_the_default_alone(function: Callable[..., Any], name: str) -> None:
    optional = inspect.signature(function).parameters[name].default is None
    message = ""
    try:
        call(function, **{name: None})
    except oocattn.OocattnError as error:  # where it is taken, nothing is at the path
        message = str(error)
    assert message.startswith(f"{name} = None (NoneType): expected") is not optional


A_BOOL, A_COUNT, A_NUMBER, A_DTYPE = "True or False", "a whole number", "finite number", "one of float16, bfloat16, float32"
BYTES, SECONDS, FUNCTIONS = "bytes, as a whole number", "seconds, as a number", "functions of an Event"


async def listen(event: oocattn.Event) -> None:
    """No function that can be called from a thread."""


REFUSED: list[tuple[Callable[..., Any], str, list[Any], str]] = [
    *(
        (function, name, ["false", "no", "", 1, 0, 0.0, np.int64(1), np.array([True])], A_BOOL)
        for function, name in (
            *((oocattn.plan, "causal"), (oocattn.attention, "causal"), (bench, "causal"), (bench, "warm_up")),
            *((oocattn.attention, "overwrite"), (oocattn.synthesise, "overwrite"), (oocattn.import_arrays, "overwrite")),
            *((oocattn.resume, "accept_other_bits"), (oocattn.resume, "check_finished"), (oocattn.verify, "checksums")),
        )
    ),
    *(
        (function, name, [True, np.True_, "64", 1.5, 4.0, -1, float("nan"), 10**40, torch.tensor(1.0)], A_COUNT)
        for function, name in (
            *((oocattn.plan, "chunks"), (oocattn.plan, "lanes"), (oocattn.verify, "rows"), (oocattn.verify, "seed")),
            *(
                (oocattn.synthesise, name)
                for name in ("tokens", "keys", "heads", "kv_heads", "head_dim", "value_dim", "batch", "seed", "workers")
            ),
            *((bench, name) for name in ("tokens", "heads", "kv_heads", "head_dim", "repeats", "rows", "seed")),
        )
    ),
    (bench, "tokens", [0], A_COUNT),
    (oocattn.verify, "rows", [0], A_COUNT),
    (oocattn.synthesise, "workers", [0], A_COUNT),
    (oocattn.verify, "seed", [2**64], A_COUNT),
    (oocattn.plan, "scale", ["0.125", True, 0, -1, 1e300, 1e-320, 10**400, Decimal("0.5"), np.float64("nan")], A_NUMBER),
    (oocattn.attention, "scale", [float("nan"), float("inf"), -0.0, np.float32("inf")], A_NUMBER),
    (oocattn.synthesise, "mean", ["1", True, float("nan"), float("inf"), 1e300], "finite number|at most in size"),
    (oocattn.plan, "host_memory", [True, [1], {}, float("nan"), float("inf")], BYTES),
    (oocattn.plan, "device_memory", [False, (1,), np.float32("nan")], BYTES),
    (oocattn.verify, "host_memory", [True, [1]], BYTES),
    (oocattn.plan, "checkpoint_interval", [True, [1], float("nan"), float("inf")], SECONDS),
    (oocattn.attention, "time_limit", [True, [1], float("nan"), np.timedelta64("NaT")], SECONDS),
    (oocattn.plan, "decomposition", [3, ["cqs"], "CQS", ""], "one of auto, cqs, strips"),
    (oocattn.plan, "kernel", [3, ["cpu"], "", True], "one of cpu, reference"),
    (oocattn.attention, "precise", [1, "yes", [True]], "True or False"),
    (oocattn.import_arrays, "layout", [3, ["hnd"], "HND", ""], "one of bhnd, bnhd, hnd, nhd"),
    (oocattn.attention, "callbacks", [print, 3, "abc", [None], [print, 3], [listen]], FUNCTIONS),
    (oocattn.resume, "callbacks", [print], FUNCTIONS),
    (oocattn.attention, "dashboard_address", [8787, True, ("127.0.0.1", 0)], "a text"),
    (oocattn.plan, "dtype", ["", 0, "float64", np.float64, float, int, torch.float64, np.dtype(">f4"), "16"], A_DTYPE),
    (oocattn.synthesise, "dtype", [torch.int8, np.zeros(1, np.float16), "uint16"], A_DTYPE),
    (oocattn.import_arrays, "dtype", [3, [np.float16]], A_DTYPE),
]


@pytest.mark.parametrize(
    ("function", "name", "value", "expected"),
    [
        pytest.param(function, name, value, expected, id=f"{function.__name__}-{name}={value!r:.20}")
        for function, name, values, expected in REFUSED
        for value in values
    ],
)
def test_what_an_option_cannot_be_is_refused(
    function: Callable[..., Any], name: str, value: object, expected: str, fast_path: Path
) -> None:
    with pytest.raises(ProblemError, match=rf"^{name} = .* \(\w+\): expected .*{expected}"):
        call(function, **{name: value})
    assert not list(fast_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host_memory": -1}, "host_memory -1 must be a whole number of at least 1"),
        ({"host_memory": 1.5}, "host_memory 1.5 must be a whole number"),
        ({"device_memory": "-1GiB"}, "device_memory '-1GiB' is not understood: write it as"),
        ({"checkpoint_interval": timedelta(seconds=-1)}, "checkpoint_interval -1.0 must be a number of seconds, at least 0"),
        ({"checkpoint_interval": "soon"}, "checkpoint_interval 'soon' is not understood: write it as"),
    ],
    ids=str,
)
def test_a_size_or_duration_out_of_range_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ProblemError, match=f"^{words}"):
        call(oocattn.plan, **options)


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(32))


# What is taken


@pytest.mark.parametrize("true", [True, np.True_, np.array(True), torch.tensor(True)], ids=repr)
def test_a_bool_of_numpy_or_torch_is_one(dataset: Path, true: object) -> None:
    assert oocattn.plan(dataset, causal=true).problem.causal is True


HALF = [0.5, np.float32(0.5), ml_dtypes.bfloat16(0.5), Fraction(1, 2), torch.tensor(0.5)]


@pytest.mark.parametrize("half", HALF, ids=repr)
def test_a_number_of_any_kind_is_a_scale(dataset: Path, half: Any) -> None:
    found = oocattn.plan(dataset, scale=half).problem.scale
    assert (found, type(found)) == (0.5, float)


def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(dataset: Path, fast_path: Path) -> None:
    found = oocattn.plan(
        dataset, chunks=np.int64(3), lanes=torch.tensor(2), host_memory=np.uint64(1 << 30), device_memory=np.float64(2**30),
        checkpoint_interval=timedelta(minutes=5),
    )  # fmt: skip
    assert (found.chunks, found.lanes, found.host_memory, found.device_memory) == (3, 2, 1 << 30, 1 << 30)
    assert found.checkpoint_seconds == 300
    assert found.digest == oocattn.plan(dataset, chunks=3, lanes=2).digest
    sizes = {"tokens": np.int32(8), "heads": np.uint8(1), "head_dim": np.array(4), "seed": np.int64(3)}
    oocattn.synthesise(fast_path / "a.zarr", dtype="float32", mean=np.float32(2), **sizes)
    oocattn.synthesise(fast_path / "b.zarr", dtype="float32", mean=2, tokens=8, heads=1, head_dim=4, seed=3)
    for name in "qkv":
        found, expected = (zarr.open_group(fast_path / path, mode="r")[name][...] for path in ("a.zarr", "b.zarr"))
        np.testing.assert_array_equal(found, expected)


def test_a_large_size_keeps_its_last_digit(dataset: Path) -> None:
    assert oocattn.plan(dataset, host_memory=(1 << 60) + 1).host_memory == (1 << 60) + 1


WRITTEN = {
    "float16": ["float16", "fp16", "half", "FLOAT16", "torch.float16", torch.float16, torch.half, np.float16, np.dtype("e")],
    "bfloat16": ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16, ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)],
    "float32": ["float32", "fp32", "float", "single", torch.float, np.float32, np.dtype("<f4"), np.str_("float32")],
}


@pytest.mark.parametrize(
    ("name", "written"), [pytest.param(name, each, id=repr(each)) for name in WRITTEN for each in WRITTEN[name]]
)
def test_a_dtype_may_be_written_as_in_numpy_or_torch(name: str, written: Any) -> None:
    assert dtype("dtype", written) == name


def test_every_supported_dtype_can_be_written() -> None:
    assert list(WRITTEN) == list(DTYPES)


def test_every_function_takes_a_dtype_of_torch(dataset: Path, fast_path: Path) -> None:
    assert oocattn.plan(dataset, dtype=torch.bfloat16).problem.out_dtype == "bfloat16"
    result = oocattn.attention(dataset, "out.zarr", dtype=torch.float16)
    assert result.out.dtype == np.float16
    oocattn.synthesise("new.zarr", tokens=8, heads=1, head_dim=4, dtype=torch.bfloat16)
    assert zarr.open_group("new.zarr", mode="r")["q"].dtype == ml_dtypes.bfloat16
    np.save("a.npy", np.zeros((1, 8, 4)))
    oocattn.import_arrays("imported.zarr", q="a.npy", k="a.npy", v="a.npy", layout="hnd", dtype=np.float16)
    assert zarr.open_group("imported.zarr", mode="r")["q"].dtype == np.float16


def test_the_command_takes_the_same_words_for_dtypes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "new.zarr", "--tokens", "8", "--heads", "1", "--head-dim", "4", "--dtype", "bf16"]) == 0
    assert main(["plan", "new.zarr", "--dtype", "fp16"]) == 0
    assert "bfloat16 to float16" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--dtype=float64", "--scale=nan", "--scale=-1", "--scale=0", "--scale=x"])
def test_an_option_that_cannot_be_is_bad_usage(dataset: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(dataset), wrong])
    assert ended.value.code == 2
    assert f"oocattn plan: {wrong.partition('=')[0]}: " in capsys.readouterr().err
