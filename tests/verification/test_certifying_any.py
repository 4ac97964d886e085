"""`verify` of results of any attention: documents, windows, terms, and a part of the rows and heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from reference import mask_by_definition
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Certificate
from oocattn.problem.given import digest_of
from oocattn.problem.problem import Problem
from oocattn.storage.files.durable import read_json
from oocattn.storage.paths import ResultPaths

TOKENS, HEADS = 150, 4
DOCUMENTS = [0, 0, 40, 41, 90, 150]
OF_KEYS = [0, 10, 10, 51, 80, 150]
TERMS = {"softcap": 5.0, "alibi_slopes": [0.5, 0.1, 0.02, 0.0]}

KINDS: dict[str, dict[str, Any]] = {
    "documents": {"causal": True, "cu_seqlens_q": DOCUMENTS, "cu_seqlens_k": OF_KEYS, **TERMS},
    "window with sinks": {"causal": True, "window_size": (20, 0), "sink_tokens": 3, "learnable_sink": [0.0, 1.0, -3.0, 9.0]},
    "a part": {"window_size": (9, 4), "queries": (70, 121), "heads": (0, 3), "key_bias": False},
    "keys used": {"causal": True, "prefix": 7, "seqused_k": [100], **TERMS},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    bias = np.random.default_rng(0).standard_normal((1, HEADS, TOKENS), np.float32)
    return write_dataset(folder / "dataset.zarr", normal_arrays(TOKENS, heads=HEADS, kv_heads=2), 40, key_bias=bias)


def run(dataset: Path, result: Path, asked: dict[str, Any]) -> Path:
    return carry_out(plan_for(dataset, chunks=4, **asked), dataset, result).path


def of_rows(asked: dict[str, Any]) -> np.ndarray:
    """The mask of the rows that are asked for: [rows, keys]."""
    mask = {name: value for name, value in asked.items() if name in mask_by_definition.__kwdefaults__}
    return mask_by_definition(1, TOKENS, TOKENS, **mask)[0][0, slice(*asked.get("queries", (0, TOKENS)))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_any_attention_is_certified(dataset: Path, tmp_path: Path, kind: str) -> None:
    asked = KINDS[kind]
    result = run(dataset, tmp_path / "result.zarr", asked)
    certificate = oocattn.verify(result, rows=60)
    assert certificate.verdict == "passed"
    attended, heads = of_rows(asked), len(asked.get("heads", range(HEADS)))
    assert certificate.ledger is not None
    assert certificate.ledger.expected == certificate.ledger.counted == attended.sum() * heads
    without = (~attended.any(axis=1)).sum() * heads
    assert certificate.ledger.rows_without_keys == without
    assert (f"{without:,} rows without a key" in str(certificate)) == bool(without)
    assert certificate.problem.rows == len(attended) * heads
    read = Certificate.from_json(read_json(ResultPaths.at(result).certificate) or {})  # without the arrays that were given
    assert read == certificate
    page = ResultPaths.at(result).certificate_page.read_text()
    assert all(certificate.words in text for text in (str(read), page))
    assert oocattn.status(result).certificate == "passed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_row_is_named_by_its_place_in_out(dataset: Path, tmp_path: Path, kind: str) -> None:
    result = run(dataset, tmp_path / "result.zarr", KINDS[kind])
    row = oocattn.verify(result, rows=30).rows[-3]
    out = zarr.open_group(result, mode="r+")["out"]
    out[0, row.head, row.token] = out[0, row.head, row.token] + np.float32(1e-3)
    found = oocattn.verify(result, rows=30, checksums=False)
    assert [(wrong.head, wrong.token) for wrong in found.wrong] == [(row.head, row.token)]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window of one more": ("window with sinks", {"window_size": [21, None]}),
    "a sink less": ("window with sinks", {"sink_tokens": 2}),
    "a prefix of one less": ("keys used", {"prefix": 6}),
    "another softcap": ("documents", {"softcap": 6.0}),
    "other rows": ("a part", {"rows_asked": [69, 120]}),
    "other heads": ("a part", {"heads": [0, 2]}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_result_of_another_problem_fails(dataset: Path, tmp_path: Path, name: str) -> None:
    """Its attributes say one, and it was computed by the other."""
    kind, other = OTHERS[name]
    result = run(dataset, tmp_path / "result.zarr", KINDS[kind])
    group = zarr.open_group(result, mode="r+")
    attributes = copy.deepcopy(group.attrs["oocattn"])
    attributes["problem"].update(other)
    group.attrs["oocattn"] = attributes
    assert oocattn.verify(result, rows=60, checksums=False).failed


def test_a_result_of_other_documents_fails(dataset: Path, tmp_path: Path) -> None:
    result = run(dataset, tmp_path / "result.zarr", KINDS["documents"])
    group = zarr.open_group(result, mode="r+")
    moved = np.array([0, 0, 40, 41, 91, 150])
    group["cu_seqlens_q"][...] = moved
    attributes = copy.deepcopy(group.attrs["oocattn"])
    attributes["problem"]["digests"]["cu_seqlens_q"] = digest_of(moved)
    group.attrs["oocattn"] = attributes
    certificate = oocattn.verify(result, rows=60, checksums=False)
    assert 90 in {row.token for row in certificate.wrong}  # both sides of the boundary are sampled
    assert certificate.ledger is not None
    assert certificate.ledger.expected != certificate.ledger.counted


def test_pairs_are_counted_by_the_definition(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the closed forms that the run counted with."""
    result = run(dataset, tmp_path / "result.zarr", KINDS["documents"])
    monkeypatch.setattr(Problem, "pairs", 7)
    ledger = oocattn.verify(result, rows=8).ledger
    assert ledger is not None
    assert ledger.expected == ledger.counted == of_rows(KINDS["documents"]).sum() * HEADS
