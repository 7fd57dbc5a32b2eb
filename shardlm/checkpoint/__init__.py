"""Checkpoints: a training state saved from one layout and restored, bit for bit, onto any other.

A checkpoint is a folder:

    metadata.json   the caller's metadata, a digest of each array, how layers are arranged, the size of each file
    state/          the arrays, written shard by shard by Orbax

Arrays are stored under their path in the state (`params/embedding/table`). What layout they had is not used again: the
target of `restore` alone says which device gets what.
"""

from .files import read_metadata, restore, save
from .run import Checkpoints

__all__ = ["Checkpoints", "read_metadata", "restore", "save"]
