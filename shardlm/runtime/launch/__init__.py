"""`python -m shardlm launch`: starts the processes of a run on this machine, and starts them again when one dies."""

from shardlm.runtime.launch.command import add

__all__ = ["add"]
