"""Text from a model on any layout: a sharded cache of keys and values, sampling, beams, scores."""
