"""The decoder-only Transformer and its configuration."""
