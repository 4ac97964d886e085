"""Partials between being computed and being merged: in memory with checkpoints, or in files."""
