"""Stores behind URLs: requests that are retried, and what their failures mean."""
