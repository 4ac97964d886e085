"""What may be asked of a dataset's attention: every form that an argument takes, and what is refused, before anything is
written."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from support import normal_arrays, write_dataset

import oocattn
import oocattn.api
from oocattn import ProblemError
from oocattn.cli.main import main
from oocattn.problem.problem import Problem

HEADS, QUERIES, KEYS = 4, 24, 40
EDGES_Q, EDGES_K = [0, 10, 10, QUERIES], [0, 0, 30, KEYS]


@pytest.fixture(autouse=True)
def _in_a_folder(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are run where the dataset is, and the machine is not measured."""
    monkeypatch.chdir(fast_path)
    monkeypatch.setattr(oocattn.api, "plan_here", lambda dataset, problem, *_, **__: SimpleNamespace(problem=problem))
    q, k, v = normal_arrays(KEYS, heads=HEADS, batch=2)
    write_dataset(fast_path / "d.zarr", (q[:, :, :QUERIES], k, v))


def posed(dataset: str = "d.zarr", **asked: Any) -> Problem:
    return oocattn.plan(dataset, **asked).problem


def add_array(name: str, data: Any, **storage: Any) -> None:
    data = np.asarray(data)
    options = {"chunks": data.shape, "compressors": None, "config": {"write_empty_chunks": True}, **storage}
    zarr.open_group("d.zarr").create_array(name, shape=data.shape, dtype=data.dtype, **options)[...] = data


# What is taken

SLOPES = [0.5, 0.25, 0.125, 0.0625]
FORMS: dict[str, Callable[[str, list[Any]], Any]] = {
    "list": lambda name, numbers: numbers,
    "tuple": lambda name, numbers: tuple(numbers),
    "numpy": lambda name, numbers: np.array(numbers),
    "strided": lambda name, numbers: np.repeat(np.array(numbers), 3)[::3],
    "big-endian": lambda name, numbers: np.array(numbers, ">i4" if isinstance(numbers[0], int) else ">f4"),
    "torch": lambda name, numbers: torch.tensor(numbers),
    "torch with a gradient": lambda name, numbers: (
        torch.tensor(numbers).float().requires_grad_()
        if isinstance(numbers[0], float)
        else torch.tensor(numbers, dtype=torch.int16)
    ),
    "npy": lambda name, numbers: _saved(name, numbers),
    "path": lambda name, numbers: Path(_saved(name, numbers)),
    "path-like": lambda name, numbers: FileName(_saved(name, numbers)),
    "array": lambda name, numbers: _added(name, numbers),
    "compressed": lambda name, numbers: _added(name, numbers, chunks=(2,), compressors=zarr.codecs.ZstdCodec()),
    "sharded": lambda name, numbers: _added(name, numbers, chunks=(1,), shards=(2,)),
}


@dataclass
class FileName:
    """A path that is no `Path`."""

    name: str

    def __fspath__(self) -> str:
        return self.name


def _saved(name: str, numbers: list[Any]) -> str:
    np.save(f"{name}.npy", np.array(numbers))
    return f"{name}.npy"


def _added(name: str, numbers: list[Any], **storage: Any) -> str:
    add_array(f"my_{name}", numbers, **storage)
    return f"my_{name}"


@pytest.mark.parametrize("form", FORMS)
def test_arrays_may_be_given_in_every_form(form):
    given = {
        "cu_seqlens_q": EDGES_Q,
        "cu_seqlens_k": EDGES_K,
        "alibi_slopes": SLOPES,
        "learnable_sink": [0.5, -1.5, 0.0, 3.0],
    }
    found = posed(**{name: FORMS[form](name, numbers) for name, numbers in given.items()})
    for name, array in found.given.items():
        assert array.dtype == (np.int64 if name.startswith("cu") else np.float32)
        np.testing.assert_array_equal(array, given.pop(name))
    assert not given
    used = posed(seqused_k=FORMS[form]("seqused_k", [0, KEYS]))
    assert list(used.given.seqused_k) == [0, KEYS]
    assert [used.mask(batch).keys for batch in range(2)] == [0, KEYS]


def test_slopes_may_differ_between_batch_entries():
    slopes = np.arange(8.0).reshape(2, HEADS)
    np.save("columns.npy", np.asfortranarray(slopes))
    add_array("rows", slopes, chunks=(1, 3))
    for form in (
        slopes,
        slopes.tolist(),
        "columns.npy",
        "rows",
        torch.tensor(slopes, dtype=torch.bfloat16),
        slopes.astype(ml_dtypes.bfloat16),
    ):
        found = posed(alibi_slopes=form)
        assert [found.slopes(found.head_group(index)) for index in range(2)] == [(0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0)]


def test_what_was_given_may_be_changed_by_the_caller_afterwards():
    edges = np.array(EDGES_Q)
    found = posed(cu_seqlens_q=edges, cu_seqlens_k=EDGES_K)
    edges[:] = 7
    assert list(found.given.cu_seqlens_q) == EDGES_Q


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((4, 2), (4, 2)),
        ([4, None], (4, None)),
        ((-1, 2), (None, 2)),
        ((-1, -1), (None, None)),
        ((None, None), (None, None)),
        (np.array([3, -1]), (3, None)),
        ((torch.tensor(3), np.int8(0)), (3, 0)),
        (None, (None, None)),
        ((10**12, 0), (10**12, 0)),
    ],
    ids=str,
)
def test_a_window_has_two_sides_of_which_minus_one_and_none_are_no_bound(window, expected):
    assert posed(window_size=window).window_size == expected


def test_causality_bounds_a_window_to_the_right():
    assert (
        posed(window_size=(4, 9), causal=True)
        == posed(window_size=(4, 0), causal=True)
        == posed(window_size=(4, -1), causal=True)
    )


def test_a_softcap_of_zero_is_none_as_in_flash_attention():
    assert posed(softcap=0.0).softcap is posed(softcap=None).softcap is None
    assert posed(softcap=np.float32(30)).softcap == 30.0


@pytest.mark.parametrize("heads", [[1, 3], (1, 3), range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3])], ids=repr)
def test_heads_and_queries_may_be_chosen(heads):
    found = posed(heads=heads, queries=np.array([5, 9]))
    assert (found.heads, found.rows_asked, found.out_shape) == ((1, 3), (5, 9), (2, 2, 4, 8))


def test_the_command_takes_every_argument(capsys, monkeypatch):
    add_array("used", [10, 40])
    np.save("slopes.npy", np.array(SLOPES))
    seen: list[Problem] = []

    def keep(dataset: Any, problem: Problem, *_: Any, **__: Any) -> SimpleNamespace:
        seen.append(problem)
        return SimpleNamespace(problem=problem, device="cpu", kernel="cpu")

    monkeypatch.setattr(oocattn.api, "plan_here", keep)
    words = "--causal --window-size 3 none --prefix 2 --sink-tokens 1 --softcap 20 --scale 0.5 --alibi-slopes slopes.npy"
    words += " --queries 2:9 --heads 0,3 --seqused-k used --learnable-sink=-1,0,1,0.5"
    assert main(["plan", "d.zarr", *words.split()]) == 0
    assert main(["plan", "d.zarr", "--window-size", "-1", "2K", "--cu-seqlens-q", "0,24", "--cu-seqlens-k", "0,40"]) == 0
    shared: dict[str, Any] = {"softcap": 20, "scale": 0.5, "alibi_slopes": SLOPES, "queries": (2, 9), "heads": [0, 3]}
    shared |= {"prefix": 2, "sink_tokens": 1, "seqused_k": [10, 40], "learnable_sink": [-1, 0, 1, 0.5]}
    assert seen[0] == posed(causal=True, window_size=(3, -1), **shared)
    assert seen[1] == posed(window_size=(None, 2048), cu_seqlens_q=[0, 24], cu_seqlens_k=[0, 40])
    capsys.readouterr()


# What is refused

ALL_KEYS = {"cu_seqlens_k": [0, KEYS]}
WHOLE = r"^\w+ = .*: expected whole numbers in one dimension"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "boundaries that are floats": ({"cu_seqlens_q": [0.0, 24.0]}, WHOLE),
    "a bool": ({"cu_seqlens_q": [False, True]}, WHOLE),
    "NaN": ({"alibi_slopes": [np.nan] * 4}, "alibi_slopes has values that are not finite in float32"),
    "beyond float32": ({"learnable_sink": [1e300, 0, 0, 0]}, "learnable_sink has values that are not finite in float32"),
    "rank 0": ({"seqused_k": np.int64(3)}, WHOLE),
    "rank 2": ({"cu_seqlens_q": [EDGES_Q]}, WHOLE),
    "rank 3": ({"alibi_slopes": np.zeros((2, 2, 4))}, r"alibi_slopes = .*: expected numbers \[Hq\] or \[B, Hq\]"),
    "ragged": ({"alibi_slopes": [[0.0, 1.0], [2.0]]}, "alibi_slopes = .*: expected numbers"),
    "empty": ({"cu_seqlens_q": []}, WHOLE),
    "objects": ({"seqused_k": np.array([1, None], object)}, WHOLE),
    "text": ({"seqused_k": ["1", "2"]}, WHOLE),
    "a set": ({"seqused_k": {1, 2}}, WHOLE),
    "a number": ({"cu_seqlens_q": 24}, "cu_seqlens_q = 24 .*: expected whole numbers"),
    "a complex number": ({"learnable_sink": [1j] * 4}, "learnable_sink = .*: expected numbers"),
    "beyond 64 bits": ({"cu_seqlens_q": np.array([0, 2**63], np.uint64)}, WHOLE),
    "no data": ({"cu_seqlens_q": torch.empty(3, device="meta")}, WHOLE),
    "boundaries that fall": ({"cu_seqlens_q": [0, 30, 24], "cu_seqlens_k": EDGES_K}, "cu_seqlens_q falls from 30 to 24"),
    "boundaries that end early": ({"cu_seqlens_q": [0, 23], **ALL_KEYS}, "from 0 to 23: expected 0 to 24"),
    "boundaries that begin late": ({"cu_seqlens_q": [1, 24], **ALL_KEYS}, "from 1 to 24: expected 0"),
    "negative boundaries": ({"cu_seqlens_q": [0, 24], "cu_seqlens_k": [-1, 40]}, "cu_seqlens_k runs from -1 to 40"),
    "one boundary": ({"cu_seqlens_q": [0], **ALL_KEYS}, r"has shape \[1\]: expected \[documents"),
    "documents of one side": ({"cu_seqlens_q": EDGES_Q}, "alone, for 24 queries and 40 keys"),
    "documents of keys alone": ({"cu_seqlens_k": EDGES_K}, "cu_seqlens_k is given without"),
    "other documents": ({"cu_seqlens_q": [0, 24], "cu_seqlens_k": EDGES_K}, "has 1 documents and cu_seqlens_k has 3"),
    "documents and used keys": (
        {"cu_seqlens_q": EDGES_Q, "cu_seqlens_k": EDGES_K, "seqused_k": [1, 2]},
        "seqused_k and cu_seqlens_q are both given: expected one of them",
    ),
    "too many keys used": ({"seqused_k": [1, 41]}, "values from 1 to 41: expected 0 to 40, the number"),
    "fewer keys than none": ({"seqused_k": [-1, 40]}, "seqused_k has values from -1 to 40"),
    "used keys of one entry": ({"seqused_k": [40]}, r"seqused_k has shape \[1\]: expected \[2\], a number for"),
    "slopes of KV heads": ({"alibi_slopes": [0.5]}, r"alibi_slopes has shape \[1\]: expected \[4\] or \[2, 4\]"),
    "sinks of batch entries": ({"learnable_sink": [1, 2]}, r"learnable_sink has shape \[2\]: expected \[4\]"),
    "a window of one side": ({"window_size": 4}, r"window_size = 4 \(int\): expected \(left, right\)"),
    "a window of three sides": ({"window_size": (1, 2, 3)}, r"window_size = \(1, 2, 3\) .*: expected \(left, right\)"),
    "a window in words": ({"window_size": "44"}, r"window_size = '44' \(str\): expected \(left, right\)"),
    "a negative window": ({"window_size": (-2, 0)}, r"window_size = -2 \(int\): expected a whole number of at least -1"),
    "a window of floats": ({"window_size": (4.0, 0)}, r"window_size = 4.0 \(float\): expected a whole number"),
    "a window of bools": ({"window_size": (True, 0)}, r"window_size = True \(bool\): expected a whole number"),
    "sinks without a window": ({"sink_tokens": 2, "causal": True}, "sink_tokens = 2 without a window"),
    "a prefix of everything": ({"prefix": 2}, "prefix = 2 where every row attends all keys"),
    "a negative prefix": ({"prefix": -1, "causal": True}, "prefix = -1 .*: expected a whole number of at least 0"),
    "a negative softcap": ({"softcap": -1.0}, "softcap = -1.0 .*: expected a positive finite number"),
    "a tiny softcap": ({"softcap": 1e-300}, "softcap = 1e-300 .*: expected a positive finite number"),
    "no queries": ({"queries": (5, 5)}, r"queries = \(5, 5\): expected 0 <= start < stop <= 24"),
    "queries beyond the last": ({"queries": (5, 25)}, r"queries = \(5, 25\): expected .* stop <= 24, the number of queries"),
    "queries from the end": ({"queries": (-4, 24)}, "queries = -4 .*: expected a whole number of at least 0"),
    "one query": ({"queries": 5}, r"queries = 5 \(int\): expected \(start, stop\)"),
    "no heads": ({"heads": []}, r"heads = \[\]: expected ascending indices of query heads"),
    "heads twice": ({"heads": [1, 1]}, r"heads = \[1, 1\]: expected ascending .* each once, up to 3"),
    "heads that fall": ({"heads": [3, 0]}, r"heads = \[3, 0\]: expected ascending indices"),
    "a head beyond the last": ({"heads": [4]}, r"heads = \[4\]: expected ascending .* each once, up to 3"),
    "heads in words": ({"heads": "01"}, "heads = '01' .*: expected a list of whole numbers"),
    "a number as key_bias": ({"key_bias": 1}, "key_bias = 1 .*: expected True or False"),
    "no such file": ({"cu_seqlens_q": "no.npy"}, "cu_seqlens_q: there is no file .*no.npy"),
    "no such folder": ({"cu_seqlens_q": "no/no.npy"}, "cu_seqlens_q: there is no file .*no.npy"),
    "a file far away": ({"cu_seqlens_q": "s3://bucket/no.npy"}, "cu_seqlens_q: s3://bucket/no.npy is a URL"),
    "no such array": ({"cu_seqlens_q": "docs"}, "cu_seqlens_q = 'docs': found no such array .* only k, q, v"),
    "an array elsewhere": ({"cu_seqlens_q": "../d.zarr/q"}, "cu_seqlens_q = '../d.zarr/q': expected the path of"),
    "the folder above": ({"cu_seqlens_q": ".."}, "cu_seqlens_q = '..': expected the path of"),
    "a name that ends early": ({"cu_seqlens_q": "e\0"}, r"cu_seqlens_q = 'e\\x00': expected the path of"),
    "endless heads": ({"heads": itertools.count()}, "heads = count.*: expected a list of whole numbers, 1,048,576 at most"),
    "an endless window": ({"window_size": itertools.count()}, "window_size = count.*: expected .left, right."),
    "more than can be": ({"cu_seqlens_q": range(10**9)}, "cu_seqlens_q = range.*: expected at most 67,108,864 numbers"),
    "no name": ({"cu_seqlens_q": ""}, "cu_seqlens_q = '': expected the path of"),
    "an array of four dimensions": ({"cu_seqlens_q": "q"}, r"array \[2, 4, 24, 8\] .* in one dimension or two"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_that_cannot_be_is_refused_by_name(case):
    asked, message = REFUSED[case]
    before = sorted(os.listdir())
    with pytest.raises(ProblemError, match=message):
        oocattn.attention("d.zarr", "out.zarr", **asked)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--window-size", "x", "0"],
        ["--window-size", "-2", "0"],
        ["--queries", "5"],
        ["--queries", "a:b"],
        ["--heads", "a"],
        ["--softcap", "-1"],
        ["--prefix", "-1"],
        ["--sink-tokens", "x"],
    ],
    ids=" ".join,
)
def test_words_of_the_command_that_cannot_be_are_bad_usage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "d.zarr", *words])
    assert ended.value.code == 2
    assert f"oocattn plan: {words[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--cu-seqlens-q no.npy", "--cu-seqlens-q docs", "--heads 0,9"])
def test_an_argument_that_cannot_be_is_one_line_of_the_command(words, capsys):
    assert main(["run", "d.zarr", "out.zarr", *words.split()]) == 1
    assert re.fullmatch(r"oocattn: [^\n]+\n", capsys.readouterr().err)
    assert os.listdir() == ["d.zarr"]


def test_an_argument_that_no_function_has_is_a_type_error():
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'casual'"):
        oocattn.plan("d.zarr", casual=True)  # type: ignore[call-arg]
