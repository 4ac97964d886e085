"""CUDA C++ of our own, compiled at run time, and helpers of all kernels for GPUs."""
