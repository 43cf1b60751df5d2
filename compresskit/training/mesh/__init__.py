"""Several ways to divide a model at once: copies of shards, layers split among ranks, on one mesh."""
