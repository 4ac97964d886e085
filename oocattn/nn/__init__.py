"""Attention of tensors of PyTorch in memory, as a model calls it."""

from oocattn.nn.attention import scaled_dot_product_attention as scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
