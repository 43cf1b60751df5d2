"""Winning back quality right after pruning, without training the whole model."""
