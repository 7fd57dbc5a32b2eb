import os
import subprocess
import sys

import jax
import pytest

from shardlm.runtime import devices as devices_module
from shardlm.runtime import fake_devices


def run(code: str, **env: str) -> str:
    """Output of `code` in a fresh process that sees only the CPU."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_before_jax_starts_it_sets_the_number_of_devices():
    code = """
import jax
from shardlm.runtime import fake_devices
assert fake_devices(3) is None
fake_devices(5)                          # nothing has started: the last call holds
assert jax.device_count() == 5
fake_devices(5)                          # already so: nothing to do
assert jax.device_count() == 5
"""
    run(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_devices_that_came_from_elsewhere_count_too():
    code = """
import jax
from shardlm.runtime import fake_devices
assert jax.device_count() == 3
fake_devices(3)
try:
    fake_devices(4)
except RuntimeError as error:
    print(error)
assert jax.device_count() == 3
"""
    message = run(code, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert message.startswith("fake_devices(4) came too late: JAX has already started, with 3 CPU device(s).")
    assert "Restart the kernel or the process, and call fake_devices before that." in message


def test_after_jax_has_started_another_number_is_an_error():
    count = jax.local_device_count("cpu")
    fake_devices(count)
    with pytest.raises(RuntimeError, match=rf"fake_devices\({count + 1}\) came too late.*with {count} CPU device"):
        fake_devices(count + 1)
    assert jax.local_device_count("cpu") == count


@pytest.mark.parametrize("count", [0, -1, 2.0])
def test_the_number_is_a_positive_integer(count):
    with pytest.raises(ValueError, match="is a positive integer"):
        fake_devices(count)


@pytest.mark.parametrize(
    ("platforms", "plugin", "devices", "expected"),
    [
        ("", True, set(), True),
        ("", False, set(), False),
        ("", True, {"/dev/nvidiactl"}, False),
        ("", True, {"/dev/accel0"}, False),
        ("cuda", True, set(), False),
    ],
)
def test_a_plugin_without_hardware_is_left_alone(monkeypatch, platforms, plugin, devices, expected):
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms or None)
    monkeypatch.setattr(devices_module.importlib.util, "find_spec", lambda name: object() if plugin else None)
    monkeypatch.setattr(devices_module.os.path, "exists", devices.__contains__)
    try:
        assert devices_module._plugin_without_hardware() is expected
    finally:
        jax.config.update("jax_platforms", asked)
