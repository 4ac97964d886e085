"""The problem: shapes, heads, dtypes, the mask and the scores; no I/O, no torch."""
