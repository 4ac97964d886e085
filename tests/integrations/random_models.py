"""Models of transformers with random weights, their inputs and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


OF_KIND: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Granite": {"attention_multiplier": 0.7},
    "Gemma2": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 0.3},
    "Gemma3Text": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 6},
    "GptOss": {"head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "ModernBert": {"local_attention": 6, "global_attn_every_n_layers": 2},
    "Llama4Text": {"head_dim": 8, "attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "ViT": {"image_size": 16, "patch_size": 4},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2},
}
"""What the configuration of a kind of model has besides `SHAPE`."""

ENCODERS = ("Bert", "ModernBert", "ViT", "T5")


def make_model(kind: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **OF_KIND.get(kind, {}), **more)
    model = f"{kind.removesuffix('Text')}{'Model' if kind in ENCODERS else 'ForCausalLM'}"
    made = getattr(transformers, model)(config).eval()
    for name, parameter in made.named_parameters():
        if "sinks" in name:
            parameter.data.normal_()  # they are not initialised
    return made


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
    if isinstance(model, transformers.ViTModel):
        return model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)).last_hidden_state
    decoded = {"decoder_input_ids": ids} if isinstance(model, transformers.T5Model) else {}
    found = model(ids, attention_mask=mask, **decoded)
    return found.last_hidden_state if hasattr(found, "last_hidden_state") else found.logits
