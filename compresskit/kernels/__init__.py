"""Fused operations: a reference implementation specifies each, and a table says which one runs."""
