"""LoRA on frozen weights: what all stages that train low-rank updates share, whatever they freeze."""
