"""How many zeros each layer gets of those that a whole model is to have."""
