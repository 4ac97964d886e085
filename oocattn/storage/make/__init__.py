"""Arrays and datasets of our own kind: created, synthesised, imported."""
