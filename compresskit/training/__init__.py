"""The door to Trainer and accelerate: one trainer, strategies and their rules, held zeros."""
