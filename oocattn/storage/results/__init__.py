"""Results: growing, complete, and their checksums."""
