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
