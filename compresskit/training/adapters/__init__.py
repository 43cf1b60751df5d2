"""Adapters on a frozen model: how weights are frozen, what is trained on top, and how it is folded in."""
