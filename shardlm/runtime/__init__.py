"""What a training process needs around the model: its devices, and later its peers and its end."""

from shardlm.runtime.devices import fake_devices

__all__ = ["fake_devices"]
