"""Models in and out of Hugging Face folders, on any layout."""

from shardlm.hub.adapters import load_lora, save_lora
from shardlm.hub.load import load_hf
from shardlm.hub.save import save_hf
from shardlm.hub.stored import load_tokenizer
from shardlm.hub.tokenizer import HubTokenizer

__all__ = ["HubTokenizer", "load_hf", "load_lora", "load_tokenizer", "save_hf", "save_lora"]
