"""Kernels around the attention calls of libraries: cuDNN, FlashAttention 2 and 3."""
