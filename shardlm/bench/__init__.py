"""Measurements of the library on the machine at hand: `python -m shardlm.bench`."""
