"""The shape of the small dataset that commands make and read."""

SMALL = ["--tokens", "1K", "--heads", "2", "--head-dim", "16", "--dtype", "float32"]
