"""Devices to compile for that need not exist: GPUs and TPU slices, so that their own compilers judge a step.

XLA compiles for a GPU or a TPU on any Linux machine, from a description of the hardware; only the compiler must be
there, as a plugin of JAX. A `Trainer` on these devices cannot run, but says with `explain(..., compile=True)` what the
compiler makes of the step: what it sends, and the memory it takes.

    devices = sl.inspect.topologies.gpus(8)
    sl.Trainer(config, sl.Layout(fsdp=8), devices=devices).explain(16, 1024, compile=True)

JAX looks for plugins once, when it starts, and the plugins look for hardware then: on a machine without it, keep them
from that with JAX_PLATFORMS=cpu in the environment.
"""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from shardlm._extras import install

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85017755648
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""An H100 SXM as XLA describes hardware, a `GpuTargetConfigProto` in text form.

A *core* is a streaming multiprocessor, of which 132 are enabled, and a *block* what runs on one: at most 1024 threads,
in warps of 32, with 48 KiB of shared memory, or 227 KiB where a kernel opts in. Sizes are in bytes, `memory_bandwidth`
in bytes per second. `cuda_compute_capability` 9.0 is Hopper: it decides what code the compiler may make.
"""

_CUDA = "jax_plugins.xla_cuda12"


def gpus(count: int = 8, *, per_host: int = 8, target: str = H100) -> list[Any]:
    """GPUs to compile for.

    Args:
        count: how many; those of a host are an NVLink domain.
        per_host: how many a host has; with fewer in all there is one host.
        target: the hardware, a `GpuTargetConfigProto` in text form.

    Raises:
        ImportError: XLA's GPU compiler is not installed.
        RuntimeError: JAX started without it.
        ValueError: `count` is no multiple of `per_host`.

    Example:
        >>> trainer = sl.Trainer(config, sl.Layout(fsdp=8), devices=gpus(8))
    """
    per_host = min(count, per_host)
    if count < 1 or count % per_host:
        raise ValueError(f"{count} GPUs are not a positive multiple of per_host={per_host}")
    if not installed("cuda"):
        raise _missing("GPU", "topologies")
    topology = f"1x{count // per_host}x{per_host}"  # NVLink domains x hosts x GPUs
    try:
        described = topologies.get_topology_desc(topology, "cuda", topology=topology, target_config=target)
    except NotImplementedError as error:
        raise RuntimeError(
            "JAX started without its CUDA plugin, which wants a GPU unless JAX_PLATFORMS=cpu is in the environment: "
            f"set that, and start again ({error})"
        ) from error
    return list(described.devices)


def tpus(topology: str = "v5e:2x4", *, slices: int = 1) -> list[Any]:
    """A TPU slice, or several, to compile for.

    Args:
        topology: generation and shape of the slice, as in "v5e:2x4", "v4:2x2x2", "v5p:2x2x1", "v6e:4x4".
        slices: how many of them.

    Raises:
        ImportError: XLA's TPU compiler is not installed.

    Example:
        >>> trainer = sl.Trainer(config, sl.Layout(data=2, fsdp=8), devices=tpus("v5e:2x4", slices=2))
    """
    if not installed("tpu"):
        raise _missing("TPU", "tpu")
    options = {"num_slices": slices} if slices > 1 else {}
    skip = "TPU_SKIP_MDS_QUERY"  # libtpu asks the cloud's metadata server which TPU this is, and waits for an answer
    before = os.environ.get(skip)
    os.environ[skip] = "1"
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    finally:
        if before is None:
            del os.environ[skip]
        else:
            os.environ[skip] = before


def named(name: str, count: int) -> list[Any]:
    """The devices of a name: "h100", or a TPU slice, as in "v5e:2x4".

    Args:
        name: "h100" or what `tpus` takes.
        count: how many there are to be.

    Raises:
        ValueError: no such name, or the slice has another number of devices.
    """
    if name == "h100":
        return gpus(count)
    if ":" not in name:
        raise ValueError(f'cannot compile for {name!r}: it is "cpu", "h100", or a TPU slice as in "v5e:2x4"')
    try:
        devices = tpus(name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no TPU slice is called {name!r}: {error}") from error
    if len(devices) != count:
        raise ValueError(f"{name} has {len(devices)} devices, but the layout {count}")
    return devices


def installed(platform: str) -> bool:
    """Whether the compiler for "cuda" or "tpu" is installed."""
    if platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec(_CUDA) is not None


def _missing(kind: str, extra: str) -> ImportError:
    return ImportError(
        f"XLA's {kind} compiler is not installed: {install(extra)} (it needs no {kind}; start with "
        "JAX_PLATFORMS=cpu in the environment from then on)"
    )
