"""The program that is taken for right: the same model on one device, as plain JAX, with no `shard_map` anywhere."""

from shardlm.layout import Layout
from shardlm.train.trainer import Trainer


def plain_of(trainer: Trainer) -> Trainer:
    """A trainer of the same model, optimizer and seed on the first of the devices, whose layout splits nothing.

    Its engine is "auto", which on one device is the Flax module called as it stands: no collective of ours, no
    accumulation, nothing recomputed.
    """
    devices = list(trainer.mesh.devices.flat)[:1]
    return Trainer(trainer.config, Layout(), trainer.optimizer, seed=trainer.seed, devices=devices, engine="auto")
