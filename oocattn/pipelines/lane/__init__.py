"""A lane: one device with its buffers, which stages, attends, merges and writes."""
