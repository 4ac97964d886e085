"""Results: they grow chunk by chunk, get their name when complete, and carry checksums."""
