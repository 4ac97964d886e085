"""Who computes which pairs of chunks: divisions of one head group into subproblems, in pure integers."""
