"""The `oocattn` command: its options, what it prints, its exit codes; no decisions."""
