"""Checkpoints: a training state saved from one layout and restored, bit for bit, onto any other.

A checkpoint is a folder:

    metadata.json   when and by how many processes it was saved, the caller's metadata, dtype, shape and digest of each
                    array, how layers are arranged, size and hash of each file; the last line is a digest of the others
    state/          the arrays, written shard by shard by Orbax
    tokenizer/      the files that make the run's tokenizer again, where it has one

The digests and hashes tell what was truncated, lost or changed by accident. They are no signature: who makes a file on
purpose can make its digest too. So what metadata.json says is checked before it is used (`fields`), a name in it leads
to plain files inside the folder alone, and links are refused.

Arrays are stored under their path in the state (`params/embedding/table`). What layout they had is not used again: the
target of `restore` alone says which device gets what.
"""

from .files import read_metadata, restore, save
from .processes import CheckpointWarning, SaveError
from .record import DamagedCheckpoint
from .run import Checkpoints
from .texts import read_texts

__all__ = [
    "CheckpointWarning",
    "Checkpoints",
    "DamagedCheckpoint",
    "SaveError",
    "read_metadata",
    "read_texts",
    "restore",
    "save",
]
