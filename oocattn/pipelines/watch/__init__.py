"""Listeners of a run: events, progress bar, status file, report, timeline."""
