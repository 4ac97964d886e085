"""Bytes at rest: Zarr arrays and how they are read, written, made and imported; nothing of attention belongs here."""
