"""What runs the tasks and edges of a run."""
