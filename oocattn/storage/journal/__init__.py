"""What a run keeps on disk to be resumed: journal, lock, and checksummed blocks."""
