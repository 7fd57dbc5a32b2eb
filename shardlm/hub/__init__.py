"""Models in and out of Hugging Face folders, on any layout."""

from shardlm.hub.load import load_hf

__all__ = ["load_hf"]
