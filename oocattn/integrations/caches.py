"""How many of the keys that a layer attends are those of tokens. A static cache has room for more."""

from __future__ import annotations

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import StaticLayer


def filled_rows(cache: Cache | None, layer: int, key: torch.Tensor) -> int:
    """How many rows of keys [B, Hkv, Nk, D] hold tokens, when layer number `layer` attends them after it updated `cache`."""
    caches = [cache] if cache is not None else []
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    layers = [each for found in caches for each in found.layers if isinstance(getattr(each, "keys", None), torch.Tensor)]
    holder = next((each for each in layers if _share_memory(each.keys, key)), None)
    if holder is None and len(caches) == 1 and layer < len(caches[0].layers):
        holder = caches[0].layers[layer]  # the layer attends a copy
    if not isinstance(holder, StaticLayer) or holder.max_cache_len != key.shape[2]:
        return key.shape[2]
    return min(int(holder.get_seq_length()), key.shape[2])


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
