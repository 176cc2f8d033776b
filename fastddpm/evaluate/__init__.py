"""How good a model is: its likelihood, and the Fréchet distance of its samples."""
