"""What watches a run: its events, and the progress bar, status file, report and timeline made of them."""
