"""Several CPU devices on one machine, so that any layout runs without an accelerator."""

import importlib.util
import os

import jax

from shardlm._errors import is_int

MOST = 2048  # of one process: with more, JAX takes some to be another process's


def fake_devices(count: int = 8) -> None:
    """Split the CPU into `count` JAX devices.

    Where JAX finds an accelerator, `jax.devices()` still returns that, and `jax.devices("cpu")` these. A GPU plugin on
    a machine without GPUs, which is there to compile for them, is left alone. Calling it again with the same count does
    nothing.

    Args:
        count: number of CPU devices, for this process.

    Raises:
        RuntimeError: JAX has started already, with another number of CPU devices.

    Example:
        >>> import shardlm as sl
        >>> sl.fake_devices(8)
        >>> mesh = sl.Layout(data=2, fsdp=2, tensor=2).mesh()
    """
    if not is_int(count) or not 1 <= count <= MOST:
        raise ValueError(f"fake_devices({count!r}): the number of devices is a positive integer, at most {MOST}")
    if _plugin_without_hardware():
        jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX refuses a new number once a backend has started
        started = _cpu_devices()
        if started != count:
            raise RuntimeError(
                f"fake_devices({count}) came too late: JAX has already started, with {started} CPU device(s). "
                "The first use of a device (jax.devices(), any jax.numpy operation) fixes their number. "
                "Restart the kernel or the process, and call fake_devices before that."
            ) from error


def _plugin_without_hardware() -> bool:
    """Whether JAX would try a GPU plugin, fail and print a page: it is there to compile for GPUs, and no GPU is."""
    if getattr(jax.config, "jax_platforms", None) or os.name != "posix":
        return False
    plugin = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")
    hardware = any(
        os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "nvidia0", "dxg", "accel0", "vfio/0", "kfd")
    )
    return plugin is not None and not hardware


def _cpu_devices() -> int:
    """Number of this process's CPU devices; 0 where JAX runs without its CPU backend."""
    try:
        return len(jax.local_devices(backend="cpu"))
    except RuntimeError:
        return 0
