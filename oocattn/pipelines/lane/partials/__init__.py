"""Stores of partials until they are merged: memory with checkpoints, or files."""
