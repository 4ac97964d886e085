"""A run: the Dask graph, the lane that works through it, and what watches it; no mathematics belongs here."""
