"""What a training process needs around the model: its devices, its peers, and its end."""

from shardlm.runtime.devices import fake_devices
from shardlm.runtime.processes import initialize

__all__ = ["fake_devices", "initialize"]
