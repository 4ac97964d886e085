"""Models of transformers with random weights: oocattn gives the logits that `sdpa` gives, and records what layers get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import oocattn

transformers = pytest.importorskip("transformers")

TOKENS, WINDOW = 20, 5
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
STREAMED, SMALL = 1, None  # device_memory


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Attention of oocattn is known while a test runs, and gradients are off."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    mappings = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    found = [dict(mapping) for mapping in mappings]
    with torch.no_grad():
        yield
    for mapping, before in zip(mappings, found, strict=True):
        mapping.clear()
        mapping.update(before)


def make_model(kind: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    if kind == "Mistral":
        more["sliding_window"] = WINDOW
    if kind == "Bert":
        return transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def make_ids() -> torch.Tensor:
    return torch.randint(1, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def padding(left: int = 0, right: int = 0, hole: int | None = None) -> torch.Tensor:
    """A mask of two entries, the second with padding at its ends."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, TOKENS - right :] = 0
    if hole is not None:
        mask[1, hole] = 0
    return mask


def outputs(model: Any, implementation: str, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    found = model(ids, attention_mask=mask)
    return found.last_hidden_state if hasattr(found, "last_hidden_state") else found.logits


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("Llama", None),
        ("Llama", padding(left=6)),
        ("Llama", padding(right=7)),
        ("Mistral", padding()),
        ("Mistral", padding(3, 12)),  # rows after the window of the last key
        ("Bert", padding(3, 12)),
    ],
    ids=["Llama", "Llama-left", "Llama-right", "Mistral", "Mistral-both", "Bert-both"],
)
def test_streamed_attention_gives_the_logits_of_sdpa(kind: str, mask: torch.Tensor | None) -> None:
    """Causal, with a window and bidirectional, without padding and with it at either end."""
    model, ids = make_model(kind), make_ids()
    expected = outputs(model, "sdpa", ids, mask)
    oocattn.integrations.transformers.register(device_memory=STREAMED)
    found = outputs(model, "oocattn", ids, mask)
    there = padding().bool() if mask is None else mask.bool()
    torch.testing.assert_close(found[there], expected[there], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [None, padding(4, 3), padding(hole=9)], ids=["none", "ends", "hole"])
def test_small_calls_go_to_sdpa_with_its_own_mask(mask: torch.Tensor | None) -> None:
    model, ids = make_model("Mistral"), make_ids()
    expected = outputs(model, "sdpa", ids, mask)
    oocattn.integrations.transformers.register(device_memory=SMALL)
    assert torch.equal(outputs(model, "oocattn", ids, mask), expected)


@pytest.mark.parametrize("memory", [STREAMED, SMALL], ids=["streamed", "small"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_text_is_generated_from_a_cache_with_padding_at_the_left(kind: str, cache: str | None, memory: int | None) -> None:
    """The mask of a static cache is made before the model gets it."""
    model, ids = make_model(kind), make_ids()
    oocattn.integrations.transformers.register(device_memory=memory)
    options = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": cache, "output_logits": True}
    found = []
    for implementation in ("sdpa", "oocattn"):
        model.set_attn_implementation(implementation)
        made = model.generate(ids, attention_mask=padding(left=6), return_dict_in_generate=True, **options)
        found.append(torch.stack(made.logits))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_softcap_and_sinks_of_a_model_are_those_of_its_eager_attention() -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    model, ids = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape)).eval(), make_ids()
    expected = outputs(model, "eager", ids, None)
    oocattn.integrations.transformers.register()
    torch.testing.assert_close(outputs(model, "oocattn", ids, None), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_streamed_is_refused_by_name() -> None:
    model, ids = make_model(), make_ids()
    oocattn.integrations.transformers.register(device_memory=STREAMED)
    dense = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(oocattn.ProblemError, match="padding between other tokens of batch entry 1"):
        outputs(model, "oocattn", ids, padding(hole=9))
    with pytest.raises(oocattn.ProblemError, match="attention_mask: a dense mask or bias is not supported"):
        outputs(model, "oocattn", ids, dense)
    with pytest.raises(oocattn.ProblemError, match="remap_positions_for_packed_sequence, which is no band"):
        model(ids, position_ids=torch.arange(TOKENS).remainder(7).expand(2, -1), use_cache=False)  # packed texts
    with pytest.raises(oocattn.ProblemError, match=r"no dropout; call model.eval\(\)"):
        make_model(attention_dropout=0.5, attn_implementation="oocattn").train()(ids)
    with torch.enable_grad(), pytest.raises(oocattn.ProblemError, match=r"torch.no_grad\(\)"):
        model(ids)
    with pytest.raises(oocattn.ProblemError, match="device_memory 'much'"):
        oocattn.integrations.transformers.register(device_memory="much")
    with pytest.raises(oocattn.ProblemError, match=r"s3://bucket/x: .* a local path, not to a URL"):
        oocattn.integrations.transformers.register(scratch="s3://bucket/x")


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "oocattn"])
def test_a_recorded_layer_is_a_dataset_whose_attention_is_the_layers(fast_path: Path, implementation: str) -> None:
    oocattn.integrations.transformers.register()
    model, ids, got = make_model(), make_ids(), []
    model.set_attn_implementation(implementation)
    expected = model(ids).logits
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    with oocattn.integrations.transformers.capture(model, fast_path / "store.zarr", layers=[1]):
        assert torch.equal(model(ids).logits, expected)
    model(ids)  # is not recorded any more
    assert {path.name for path in (fast_path / "store.zarr").iterdir()} == {"zarr.json", "layer-1"}
    result = oocattn.attention(fast_path / "store.zarr/layer-1", fast_path / "out.zarr", causal=True, engine="inline")
    out = np.asarray(result.out[...]).swapaxes(1, 2).reshape(2, TOKENS, -1)  # [B, N, Hq D], as the layer goes on with it
    np.testing.assert_allclose(out, got[0].numpy(), rtol=0, atol=1e-5)


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
