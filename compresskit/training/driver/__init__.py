"""Training whose ranks differ: steps of their own between exchanges, or stages of their own in a pipeline."""
