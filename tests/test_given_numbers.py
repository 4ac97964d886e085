"""What may be given as boundaries of documents, used keys, slopes or sinks, and what is no such numbers: in Python and on
the command line, it is refused in one line that names the argument, before anything is written."""

from __future__ import annotations

import array
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask.array
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from support import normal_arrays, write_dataset
from zarr.storage import MemoryStore

import oocattn
import oocattn.api
from oocattn import ProblemError
from oocattn.cli.main import main

GIVEN: dict[str, list[Any]] = {
    "cu_seqlens_q": [0, 10, 24],
    "seqused_k": [3, 24],
    "alibi_slopes": [0.5, 0.25],
    "learnable_sink": [0.5, -1.5],
}
"""Each argument, with numbers that it may have."""

COUNTS = ("cu_seqlens_q", "seqused_k")
ORDERED = (*COUNTS, "learnable_sink")  # in one dimension


FILES: dict[str, Any] = {
    "NaN": np.array([np.nan, 1]),
    "bools": np.ones(2, bool),
    "complex": np.ones(2, complex),
    "one": np.array(3),
    "none": np.ones(0),
    "times": np.arange(2).astype("M8[s]"),
    "deep": np.ones((1, 1, 2)),
}
"""What is no such numbers, in the dataset and in .npy files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and files beside it; nothing else is ever written there."""
    path = tmp_path_factory.mktemp("numbers")
    write_dataset(path / "d.zarr", normal_arrays(24, heads=2, batch=2))
    for name, numbers in FILES.items():
        zarr.open_group(path / "d.zarr").create_array(name, data=numbers)
        np.save(path / f"{name}.npy", numbers)
    np.save(path / "objects.npy", np.array([None, 1]))
    return path


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine is not measured."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(oocattn.api, "plan_here", lambda dataset, problem, *_, **__: SimpleNamespace(problem=problem))
    before = sorted(os.listdir())
    yield
    assert sorted(os.listdir()) == before


class Foreign:
    """An array of another library."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.make()


def fail() -> Any:
    raise KeyError("no data")


def masked(numbers: list[Any]) -> Any:
    return np.ma.masked_array(numbers, mask=[True] + [False] * (len(numbers) - 1))


TAKEN: dict[str, Callable[[list[Any]], Any]] = {
    "masked array without masked numbers": lambda numbers: np.ma.masked_array(numbers, mask=[False] * len(numbers)),
    "list of tensors": lambda numbers: [torch.tensor(number) for number in numbers],
    "tuple of scalars": lambda numbers: tuple(np.array(numbers)),
    "list of Python's and NumPy's": lambda numbers: [numbers[0], *np.array(numbers[1:])],
    "negated view of a tensor": lambda numbers: torch._neg_view(-torch.tensor(numbers)),
    "array.array": lambda numbers: array.array("d" if isinstance(numbers[0], float) else "q", numbers),
    "memoryview": lambda numbers: memoryview(np.array(numbers)),
    "Zarr array": lambda numbers: zarr.array(np.array(numbers)),
    "Dask array": lambda numbers: dask.array.from_array(np.array(numbers)),
    "another library's array": lambda numbers: Foreign(lambda: np.array(numbers)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_numbers_are_taken(case: str) -> None:
    for name, numbers in GIVEN.items():
        found = oocattn.plan("d.zarr", **{name: TAKEN[case](numbers)}).problem
        assert getattr(found.given, name).tolist() == numbers


REFUSED: dict[str, Callable[[list[Any]], Any]] = {
    "masked": masked,
    "masked and bfloat16": lambda numbers: masked(np.array(numbers, ml_dtypes.bfloat16)),
    "masked in a list": lambda numbers: [np.ma.masked, *numbers[1:]],
    "masked scalars": lambda numbers: [*masked(numbers).reshape(-1, 1)],
    "masked scalar of an array": lambda numbers: [np.ma.masked_array(numbers[0], mask=True), *numbers[1:]],
    "masked by Dask": lambda numbers: dask.array.ma.masked_equal(dask.array.from_array(np.array(numbers)), numbers[0]),
    "masked by another library": lambda numbers: Foreign(lambda: masked(numbers)),
    "packed in Zarr": lambda numbers: zarr.create_array(MemoryStore(), data=np.array(numbers), attributes={"add_offset": 1}),
    "NaN": lambda numbers: [float("nan"), *numbers[1:]],
    "Inf": lambda numbers: np.array([*numbers[:-1], np.inf]),
    "NaN in a Zarr array": lambda numbers: zarr.array(np.array([np.nan, *numbers[1:]])),
    "NaN of a tensor": lambda numbers: torch.tensor([torch.nan, *numbers[1:]], dtype=torch.float64),
    "None in a list": lambda numbers: [None, *numbers[1:]],
    "None in an array": lambda numbers: np.array([None, *numbers[1:]]),
    "a missing number of another library": lambda numbers: Foreign(lambda: np.array([None, *numbers[1:]], object)),
    "a bool in a list": lambda numbers: [False, *numbers[1:]],
    "NumPy's bool in a tuple": lambda numbers: (*numbers[:-1], np.True_),
    "a tensor of a bool in a list": lambda numbers: [torch.tensor(True), *map(torch.tensor, numbers[1:])],
    "a bool in rows": lambda numbers: [[False, *numbers[1:]], numbers],
    "bools": lambda numbers: np.ones(len(numbers), bool),
    "bools of a tensor": lambda numbers: torch.ones(len(numbers), dtype=torch.bool),
    "text": lambda numbers: [str(number) for number in numbers],
    "bytes": lambda numbers: b"01",
    "complex numbers": lambda numbers: np.array(numbers, complex),
    "times": lambda numbers: np.array(numbers).astype("m8[s]"),
    "records": lambda numbers: np.zeros(len(numbers), [("a", "<i8")]),
    "no dimensions": lambda numbers: np.array(numbers[0]),
    "a number": lambda numbers: numbers[0],
    "three dimensions": lambda numbers: np.array([[numbers]]),
    "ragged rows": lambda numbers: [numbers, numbers[:1]],
    "nothing": lambda numbers: [],
    "too large": lambda numbers: [*numbers[:-1], 10**40],
    "a generator": lambda numbers: (number for number in numbers),
    "a set": lambda numbers: set(numbers),
    "a dict": lambda numbers: dict.fromkeys(numbers),
    "no data": lambda numbers: torch.tensor(numbers, device="meta"),
    "a sparse tensor": lambda numbers: torch.tensor(numbers).to_sparse(),
    "a ragged tensor": lambda numbers: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
    "an array that fails": lambda numbers: Foreign(fail),
    "an endless tensor": lambda numbers: torch.zeros(1, dtype=torch.float16).expand(1, 2**40),
    "an endless Zarr array": lambda numbers: zarr.create(shape=(1, 2**40), chunks=(1, 2**20), dtype="i8"),
    "text that is no name": lambda numbers: "\udcff",
    "text that is no path": lambda numbers: "\0.npy",
    "a long text": lambda numbers: "1" * 5000,
}

OF_SOME: dict[str, tuple[tuple[str, ...], Callable[[list[Any]], Any]]] = {
    "whole floats": (COUNTS, lambda numbers: [float(number) for number in numbers]),
    "whole floats of an array": (COUNTS, lambda numbers: np.array(numbers, np.float32)),
    "bfloat16": (COUNTS, lambda numbers: torch.tensor(numbers, dtype=torch.bfloat16)),
    "negative": (COUNTS, lambda numbers: [-1, *numbers[1:]]),
    "beyond 64 bits": (COUNTS, lambda numbers: np.array([*numbers[:-1], 2**63], np.uint64)),
    "two dimensions": (ORDERED, lambda numbers: [numbers, numbers]),
    "a column": (tuple(GIVEN), lambda numbers: np.array(numbers)[:, None]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", [*REFUSED, *OF_SOME])
def test_what_is_no_numbers_is_refused_by_name(case: str) -> None:
    names, make = OF_SOME.get(case) or (GIVEN, REFUSED[case])
    for name in names:
        with pytest.raises(ProblemError, match=rf"^{name}( = | has | runs |: ).*(: expected|is no path)") as refused:
            oocattn.attention("d.zarr", "out.zarr", **{name: make(GIVEN[name])})
        assert "\n" not in str(refused.value)


WORDS = ["nan,1", "1,inf", "1e400,0", "1j,0", "true,1", "1,", ",", "None", "\udcff", "1" * 5000, "9" * 400 + ",0", "1.npy"]


@pytest.mark.parametrize("word", [*WORDS, *FILES, *(f"{file}.npy" for file in (*FILES, "objects"))])
def test_words_that_are_no_numbers_are_refused_in_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (f"--{name.replace('_', '-')}" for name in GIVEN):
        assert main(["run", "d.zarr", "out.zarr", f"{option}={word}"]) == 1
        assert re.fullmatch(rf"oocattn: {option}( |: )[^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "asked",
    [
        {"window_size": (np.ma.masked_array(5, mask=True), 0)},
        {"heads": [np.ma.masked_array(1, mask=True)]},
        {"heads": masked([0, 1])},
        {"queries": masked([0, 5])},
        {"prefix": np.ma.masked_array(5, mask=True), "causal": True},
        {"softcap": np.ma.masked},
        {"causal": np.ma.masked_array(True, mask=True)},
        {"heads": {0: 1}},
        {"queries": {5, 9}},
    ],
    ids=str,
)
def test_a_masked_number_and_what_has_no_order_are_refused_by_name(asked: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=rf"^{next(iter(asked))} = "):
        oocattn.attention("d.zarr", "out.zarr", **asked)
