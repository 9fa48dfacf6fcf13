"""Training: packed sequences become model checkpoints (the M-step), and the base model."""
