"""Proof after the fact: float64 rows, checksums and the certificate.

It shares nothing with a run.
"""
