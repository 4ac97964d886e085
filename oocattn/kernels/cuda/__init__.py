"""CUDA C++ of our own, compiled at run time, and what all kernels for NVIDIA GPUs share."""
