"""Kernels: partial attention on a device, and merging; no disks, plans or tasks."""
