"""Bytes at rest: datasets, results and the state of jobs; nothing of attention."""
