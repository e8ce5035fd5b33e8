"""Training: the loops, the optimizer, checkpoints and metrics."""
