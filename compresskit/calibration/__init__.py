"""Run data through a model block by block and measure what methods need."""
