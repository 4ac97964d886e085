"""Datasets as they are found: located, checked, and read into buffers of the caller."""
