"""Models of transformers with random weights: oocattn gives the logits that `sdpa` gives."""

from __future__ import annotations

import pydoc
from typing import Any

import pytest
import torch
from random_models import TOKENS, make_ids, make_model, outputs, padding

import oocattn

STREAMED, SMALL = 1, None  # device_memory


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


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "GptOss", "ModernBert", "ViT"])
def test_streamed_models_give_what_their_own_attention_gives(kind: str) -> None:
    """Windows on one or both sides in some layers, softcaps, sinks, scales and encoders, with padding."""
    model, ids, mask = make_model(kind), make_ids(), padding(right=7)
    there = slice(None) if kind == "ViT" else mask.bool()
    expected = outputs(model, "eager", ids, mask)[there]
    oocattn.integrations.transformers.register(device_memory=STREAMED)
    torch.testing.assert_close(outputs(model, "oocattn", ids, mask)[there], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "asked", "words"),
    [
        ("T5", {}, "^position_bias: a dense mask or bias is not supported where attention is streamed"),
        ("Llama4Text", {}, "mask has chunked_overlay, which is no band of keys"),
        ("Llama", {"cu_seq_lens_q": torch.tensor([0, 9, TOKENS])}, "^cu_seq_lens_q: this argument of the model is not"),
        ("Llama", {"indices": torch.tensor([0])}, "^indices: this argument of the model is not supported"),
    ],
    ids=["position bias", "chunks", "packed", "sparse"],
)
def test_models_that_ask_for_another_function_are_refused_by_name(kind: str, asked: dict[str, Any], words: str) -> None:
    model, ids = make_model(kind), make_ids()
    oocattn.integrations.transformers.register(device_memory=STREAMED)
    model.set_attn_implementation("oocattn")
    with pytest.raises(oocattn.ProblemError, match=words):
        model(ids, **({"decoder_input_ids": ids} if kind == "T5" else {}), **asked)


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


def test_what_integrations_offer_is_in_their_help() -> None:
    for module in (oocattn.integrations, oocattn.integrations.transformers, oocattn.nn):
        page = pydoc.plain(pydoc.render_doc(module))
        for name in module.__all__:
            assert getattr(module, name).__doc__
            assert name in dir(module)
            assert name in page
