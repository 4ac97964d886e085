"""Recordings of what the layers of a model get and ask: datasets whose attention is that of the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from random_models import TOKENS, make_ids, make_model, padding, transformers

import oocattn


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("Llama", "sdpa"),
        ("Llama", "eager"),
        ("Llama", "oocattn"),
        ("Granite", "sdpa"),
        ("Mistral", "sdpa"),
        ("Gemma2", "eager"),
        ("GptOss", "oocattn"),
    ],
)
def test_a_recorded_layer_is_a_dataset_whose_attention_is_the_layers(
    fast_path: Path, kind: str, implementation: str
) -> None:
    """Its scale, softcap, mask and sinks are recorded, and taken from there."""
    oocattn.integrations.transformers.register()
    model, ids, got = make_model(kind), make_ids(), []
    model.set_attn_implementation(implementation)
    expected = model(ids).logits
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    with oocattn.integrations.transformers.capture(model, fast_path / "store.zarr", layers=[0]):
        assert torch.equal(model(ids).logits, expected)
    model(ids)  # is not recorded any more
    assert {path.name for path in (fast_path / "store.zarr").iterdir()} == {"zarr.json", "layer-0"}
    result = oocattn.attention(fast_path / "store.zarr/layer-0", fast_path / "out.zarr", engine="inline")
    out = np.asarray(result.out[...]).swapaxes(1, 2).reshape(2, TOKENS, -1)  # [B, N, Hq D], as the layer goes on with it
    np.testing.assert_allclose(out, got[0].numpy(), rtol=0, atol=1e-5)
    assert oocattn.verify(fast_path / "out.zarr").passed


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "oocattn"])
def test_a_mask_that_is_no_band_is_not_recorded_and_a_warning_says_so(
    fast_path: Path, caplog: pytest.LogCaptureFixture, implementation: str
) -> None:
    oocattn.integrations.transformers.register()
    model = make_model("Bert")
    model.set_attn_implementation(implementation)
    with oocattn.integrations.transformers.capture(model, fast_path / "store.zarr", layers=[0]):
        model(make_ids(), attention_mask=padding(right=7))
    assert "layer-0: the mask of its model is not recorded" in caplog.text
    with pytest.raises(oocattn.ProblemError, match="say which keys are attended"):
        oocattn.plan(fast_path / "store.zarr/layer-0")
    assert oocattn.plan(fast_path / "store.zarr/layer-0", seqused_k=[TOKENS, TOKENS - 7]).problem.pairs


def test_sinks_that_are_all_zero_are_recorded(fast_path: Path) -> None:
    model = make_model("GptOss")
    model.set_attn_implementation("eager")
    model.model.layers[0].self_attn.sinks.data.zero_()
    with oocattn.integrations.transformers.capture(model, fast_path / "store.zarr", layers=[0]):
        model(make_ids())
    assert "learnable sinks, of the dataset" in str(oocattn.plan(fast_path / "store.zarr/layer-0"))


def test_a_recording_needs_no_gradient_to_be_off_and_a_layer_that_failed_is_recorded_anew(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(), make_ids()
    with torch.enable_grad(), oocattn.integrations.transformers.capture(model, fast_path / "store.zarr", layers=[0]):
        with monkeypatch.context() as patched:
            patched.setattr("oocattn.integrations.recorded.fill_array", Mock(side_effect=OSError("full")))
            with pytest.raises(OSError, match="full"):
                model(ids)
        assert model(ids).logits.requires_grad
    assert {path.name for path in (fast_path / "store.zarr").iterdir()} == {"zarr.json", "layer-0"}


def assert_same(one: Path, other: Path) -> None:
    """Two recordings of all layers hold the same."""
    import zarr

    for name in (f"layer-{layer}/{part}" for layer in (0, 1) for part in "qkv"):
        found, expected = (np.asarray(zarr.open_array(path / name, mode="r")[...]) for path in (one, other))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_recording_goes_on_where_the_cache_grows(fast_path: Path) -> None:
    model, ids = make_model(), make_ids()
    whole, parts = fast_path / "whole.zarr", fast_path / "parts.zarr"
    with oocattn.integrations.transformers.capture(model, whole):
        model(ids)
    with oocattn.integrations.transformers.capture(model, parts):
        cache = model(ids[:, :12], use_cache=True).past_key_values
        model(ids[:, 12:], past_key_values=cache)
    assert_same(whole, parts)
    asked = [oocattn.plan(store / "layer-1").problem for store in (whole, parts)]
    assert asked[0] == asked[1]
    assert asked[0].causal


def test_a_call_that_asks_for_another_scale_or_mask_than_was_recorded_is_refused(fast_path: Path) -> None:
    model, ids, capture = make_model(), make_ids(), oocattn.integrations.transformers.capture
    with capture(model, fast_path / "store.zarr", layers=[0]):
        cache = model(ids[:, :12], use_cache=True).past_key_values
        with pytest.raises(oocattn.ProblemError, match="its layer ran again with causal True, now none: expected the same"):
            model(ids[:, 12:], attention_mask=padding(hole=9), past_key_values=cache)
    with capture(model, fast_path / "store.zarr", layers=[0], overwrite=True):
        cache = model(ids[:, :12], use_cache=True).past_key_values
        model.model.layers[0].self_attn.scaling = 0.5
        with pytest.raises(oocattn.ProblemError, match=r"ran again with scale 0\.35.*, now 0\.5: expected the same"):
            model(ids[:, 12:], past_key_values=cache)


def test_a_second_pass_layers_that_are_not_there_and_an_idle_recording_are_named(
    fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    capture, model, ids = oocattn.integrations.transformers.capture, make_model(), make_ids()
    with pytest.raises(oocattn.ProblemError, match=r"layers = \[5\]: .* has the layers \[0, 1\]"):
        capture(model, fast_path / "store.zarr", layers=[5])
    with capture(model, fast_path / "store.zarr"):
        model(ids)
        with pytest.raises(oocattn.ProblemError, match="record each pass"):
            model(ids)
    with pytest.raises(oocattn.ResultExistsError, match="exists already"):
        capture(model, fast_path / "store.zarr")
    with capture(model, fast_path / "store.zarr", overwrite=True):
        pass
    assert "none of its layers ran" in caplog.text


def test_the_empty_part_of_a_static_cache_is_not_recorded(fast_path: Path) -> None:
    model, ids = make_model(), make_ids()
    with oocattn.integrations.transformers.capture(model, fast_path / "whole.zarr"):
        model(ids)
    with oocattn.integrations.transformers.capture(model, fast_path / "static.zarr"):
        cache = transformers.StaticCache(config=model.config, max_cache_len=2 * TOKENS)
        for part in ids.split([11, 8, 1], dim=1):
            model(part, past_key_values=cache)
    assert_same(fast_path / "static.zarr", fast_path / "whole.zarr")


@pytest.mark.parametrize(
    ("entries", "words"),
    [([1, 0], "other numbers in these 20 rows"), ([0], r"k \[1, 2, 21, 8\]"), ([0, 1, 1], r"k \[3, 2, 21, 8\]")],
    ids=["reordered", "fewer", "more"],
)
def test_a_cache_with_other_entries_is_refused_and_what_was_recorded_stays(
    fast_path: Path, entries: list[int], words: str
) -> None:
    model, ids = make_model(), make_ids()
    with oocattn.integrations.transformers.capture(model, fast_path / "whole.zarr"):
        model(ids)
    with oocattn.integrations.transformers.capture(model, fast_path / "changed.zarr"):
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor(entries))
        with pytest.raises(oocattn.ProblemError, match=words):
            model(torch.ones(len(entries), 1, dtype=torch.long), past_key_values=cache)
    assert_same(fast_path / "changed.zarr", fast_path / "whole.zarr")


def test_a_search_with_beams_is_refused_by_a_recording(fast_path: Path) -> None:
    """It reorders a cache whose earlier tokens are the same in all beams."""
    model, capture = make_model(), oocattn.integrations.transformers.capture
    refused = pytest.raises(oocattn.ProblemError, match="as after a search with beams")
    with capture(model, fast_path / "store.zarr"), refused:
        model.generate(make_ids()[:1], max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None)


def test_a_recording_that_ends_at_any_write_is_whole_or_refused(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token is appended to k, q and v: three chunks and three shapes are written."""
    import zarr

    model, ids, written, lengths = make_model(), make_ids()[:1], [0], []
    store = fast_path / "store.zarr"
    write = zarr.storage.LocalStore.set

    async def write_until_the_end(self: Any, *arguments: Any) -> None:
        written[0] -= 1
        if written[0] < 0:
            raise OSError("the process ends")
        await write(self, *arguments)

    ended = True
    while ended:
        with oocattn.integrations.transformers.capture(model, store, layers=[0], overwrite=True):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            with monkeypatch.context() as patched:
                patched.setattr(zarr.storage.LocalStore, "set", write_until_the_end)
                written[0] = len(lengths)
                try:
                    model(ids[:, -1:], past_key_values=cache)
                    ended = False
                except OSError:
                    pass
        arrays = {name: array[...] for name, array in zarr.open_group(store / "layer-0", mode="r").arrays()}
        assert all(np.abs(array).max(-1).min() > 0 for array in arrays.values())  # no row is of fill values
        try:
            oocattn.plan(store / "layer-0")
            lengths.append({array.shape[2] for array in arrays.values()})
        except oocattn.ProblemError:
            lengths.append(None)
    before, after = {TOKENS - 1}, {TOKENS}
    chunks = 2 * 2 + 4  # k and v of two heads, q of four
    assert lengths == [before] * (chunks + 1) + [None] * 2 + [after]


@pytest.mark.parametrize("given", ["relative.zarr", "~/home.zarr"])
def test_a_recording_goes_where_its_path_led_when_it_began(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    model, ids, capture = make_model(), make_ids(), oocattn.integrations.transformers.capture
    (fast_path / "other").mkdir()
    monkeypatch.setenv("HOME", str(fast_path))
    monkeypatch.chdir(fast_path)
    with capture(model, given, layers=[0]):
        monkeypatch.chdir(fast_path / "other")
        cache = model(ids[:, :12], use_cache=True).past_key_values
        model(ids[:, 12:], past_key_values=cache)
    assert oocattn.plan(fast_path / Path(given).name / "layer-0").problem.queries == TOKENS
    assert not list((fast_path / "other").iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "m"}, r"model = 'm' \(str\): expected a model of transformers"),
        ({"layers": 0}, r"layers = 0 \(int\): expected indices of layers"),
        ({"layers": "01"}, r"layers = '0' \(str\): expected a whole number"),
        ({"layers": [True]}, r"layers = True \(bool\): expected a whole number"),
        ({"layers": [-1]}, r"layers = -1 \(int\): expected a whole number"),
        ({"layers": []}, r"layers = \[\]: LlamaForCausalLM has the layers \[0, 1\]"),
        ({"path": None}, "found None, expected a path or a URL"),
        ({"overwrite": 2}, r"overwrite = 2 \(int\): expected True or False"),
    ],
    ids=lambda value: "".join(f"{name}-{each}" for name, each in value.items()) if isinstance(value, dict) else "",
)
def test_what_capture_is_not_given_rightly_is_refused_before_anything_is_made(
    fast_path: Path, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(oocattn.ProblemError, match=words):
        oocattn.integrations.transformers.capture(**{"model": make_model(), "path": fast_path / "store.zarr", **changed})
    assert not list(fast_path.iterdir())


@pytest.mark.parametrize("kind", [np.array, iter, set, lambda _: range(1), lambda _: [np.int64(0), 0], torch.tensor])
def test_layers_are_any_indices_that_one_can_go_through(fast_path: Path, kind: Any) -> None:
    layers = kind([0])
    model, capture = make_model(), oocattn.integrations.transformers.capture
    with capture(model, fast_path / "store.zarr", layers=layers):
        with pytest.raises(oocattn.ProblemError, match="another recording goes there"):
            capture(model, fast_path / "store.zarr", overwrite=True)
        model(make_ids())
    assert {path.name for path in (fast_path / "store.zarr").iterdir()} == {"zarr.json", "layer-0"}
    assert not model.model.layers[0].self_attn._forward_pre_hooks


def test_a_pass_of_several_packed_texts_is_not_recorded(fast_path: Path) -> None:
    """`generate_batch` hands layers a cache of this name."""
    layer, cache = make_model().model.layers[0].self_attn, type("PagedAttentionCache", (), {})()
    refused = pytest.raises(oocattn.ProblemError, match="continuous batching packs several texts")
    with oocattn.integrations.transformers.capture(layer, fast_path / "store.zarr"), refused:
        layer(torch.ones(1, 3, 32), past_key_values=cache)
