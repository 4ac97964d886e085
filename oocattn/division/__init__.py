"""Divisions of one head group's chunk pairs into subproblems, in pure integers."""
