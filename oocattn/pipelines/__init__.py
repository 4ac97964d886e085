"""A run: it begins or goes on, works through the plan on an engine, and commits the result; no mathematics."""
