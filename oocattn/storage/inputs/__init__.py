"""Datasets: located, checked, and read into the caller's buffers."""
