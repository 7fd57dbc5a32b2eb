"""Training: loss, state, step, optimizer, trainer, metrics."""
