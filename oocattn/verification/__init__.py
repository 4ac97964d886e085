"""Proof after the fact, sharing nothing with a run: rows in float64, checksums and the certificate."""
