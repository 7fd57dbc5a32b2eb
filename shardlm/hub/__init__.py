"""Models in and out of Hugging Face folders, on any layout."""

from shardlm.hub.load import load_hf
from shardlm.hub.save import save_hf
from shardlm.hub.tokenizer import HubTokenizer

__all__ = ["HubTokenizer", "load_hf", "save_hf"]
