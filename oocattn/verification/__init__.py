"""Proof after the fact: rows in float64, checksums and the certificate; it shares nothing with a run."""
