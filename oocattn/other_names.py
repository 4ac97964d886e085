"""What other libraries call our arguments, and what they have that has no argument here."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

from oocattn.naming import named

_OURS = {
    "scale": ("softmax_scale", "sm_scale", "scaling", "scale_factor"),
    "softcap": ("logits_soft_cap", "logit_soft_cap", "logits_softcap", "attn_logit_softcapping", "logit_cap", "tanh_cap"),
    "alibi_slopes": ("alibi", "alibi_slope"),
    "learnable_sink": ("s_aux", "sink", "sinks", "attention_sinks"),
    "cu_seqlens_q": ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "qo_indptr"),
    "cu_seqlens_k": ("cu_seqlens_kv", "cu_seq_lens_k", "cu_seq_lens_kv", "kv_indptr"),
    "seqused_k": ("cache_seqlens", "seq_lens", "seq_lens_kv", "kv_seqlens", "kv_seqlen", "kv_lens"),
    "sink_tokens": ("num_sinks", "num_sink_tokens"),
    "prefix": ("prefix_len", "prefix_length"),
    "dtype": ("out_dtype",),
    "device_memory": ("gpu_memory", "vram"),
    "host_memory": ("memory_limit", "ram"),
    "chunks": ("num_chunks", "n_chunks"),
    "result": ("out", "output"),
    "overwrite": ("force", "clobber"),
    "time_limit": ("timeout",),
}
"""Their names of each argument."""

_MASKS = (
    "a mask is asked for with {causal}, {window_size}, {cu_seqlens_q}, {seqused_k} and {prefix}; others are not supported"
)
_BIASES = (
    "a bias that differs by query is not supported, only {alibi_slopes}, {softcap} and an array key_bias in the dataset"
)
_WINDOW = "it is {window_size}, keys before and after the query's own"
_USED = "say with {seqused_k} how many keys each batch entry has"
_DOCUMENTS = "say with {cu_seqlens_q} where packed documents begin and end"
_BOUNDARIES = "leave it out: {cu_seqlens_q} says it"
_LSE = "leave it out: every result has lse"

_ADVICE = {
    "is_causal": "it is called {causal} here, and the last query is at the last key",
    "sliding_window": "a sliding window of W keys is {window_size}, W - 1 and 0, with {causal}",
    **dict.fromkeys(("window", "local_window_size", "window_left", "window_right", "left_window", "right_window"), _WINDOW),
    **dict.fromkeys(("attention_mask", "key_padding_mask"), _USED),
    **dict.fromkeys(("document_id", "document_ids", "segment_ids", "sequence_ids"), _DOCUMENTS),
    **dict.fromkeys(("mask", "attn_mask", "block_mask", "mask_mod"), _MASKS),
    **dict.fromkeys(("bias", "score_mod", "position_bias"), _BIASES),
    "attn_bias": f"{_MASKS}; {_BIASES}",
    **dict.fromkeys(("dropout", "dropout_p"), "there is no dropout: leave it out"),
    "key_bias": "leave it out: the dataset's array of that name is used, where there is one",
    "enable_gqa": "leave it out: query heads share the heads of k and v where these are fewer",
    "deterministic": "leave it out: the same plan gives the same bits",
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), _BOUNDARIES),
    **dict.fromkeys(("return_lse", "return_attn_probs", "return_softmax_lse"), _LSE),
}
"""What to do in place of what has no argument, or another meaning here."""


def hint(name: str, known: Collection[str]) -> str:
    """What to write for an argument that is not among those `known`; "" where nothing is known that is alike."""
    ours = next((own for own, theirs in _OURS.items() if name in theirs), None)
    if ours in known:
        return f"it is called {named(str(ours))} here"
    if name in _ADVICE and "causal" in known:
        return re.sub(r"\{(\w+)\}", lambda found: named(found[1]), _ADVICE[name])
    beginning = [each for each in known if each.startswith(name)]
    alike = beginning if len(beginning) == 1 else get_close_matches(name, known, 1, 0.84)
    return f"did you mean {named(alike[0])}?" if alike else ""
