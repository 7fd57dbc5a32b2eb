"""Gives every test 8 CPU devices, and ends the run rather than skip a test when they are missing."""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator

# Before the import, so that the processes that tests start also stay on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nor does the terminal's width, which pytest-xdist hands to its workers, fold what tests compare.
os.environ.pop("COLUMNS", None)

import jax
import pytest

from tests import xla

DEVICE_COUNT = 8


def pytest_configure() -> None:
    """Makes the devices and counts them.

    The setting wins over a device count in XLA_FLAGS and over JAX_NUM_CPU_DEVICES, so neither is changed: the user's
    other flags hold, and a process that a test starts sees the environment that a user's process would.

    XLA reads its flags once, when the first device is made, so those of tests/xla.py are in the environment until then.
    """
    # Programs in JAX's caches are millions of objects that stay: looking through them for garbage at Python's usual
    # rate is a fifth of the time of tests that trace.
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    # A shell starts background jobs with Ctrl-C ignored, and what ignores it passes that on to its children: tests that
    # send it would then depend on how the tests were started.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = xla.flags()
    try:
        _make_devices()
    finally:
        if flags is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = flags


def _make_devices() -> None:
    try:
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        jax.config.update("jax_num_cpu_devices", DEVICE_COUNT)
    except RuntimeError:
        pass  # something started a backend before us; whether it has enough devices is checked below
    try:
        devices = jax.devices()
    except (
        Exception
    ) as error:  # JAX_PLATFORMS names a platform that is not there; what JAX raises then is not specified
        raise pytest.UsageError(
            f"the tests need {DEVICE_COUNT} devices, but JAX finds none: {error!r}. "
            f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']!r}: unset it, or set it to 'cpu', to run on fake devices."
        ) from error
    if len(devices) < DEVICE_COUNT:
        raise pytest.UsageError(
            f"the tests need {DEVICE_COUNT} devices, but JAX has {len(devices)}: {devices}. "
            f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']!r}: unset it, or set it to 'cpu', to run on fake devices. "
            "If it is 'cpu' already, a pytest plugin started JAX before tests/conftest.py could ask for more: "
            "disable it with -p no:NAME."
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which compilers' programs, and whose logits, were read from recordings alone."""
    from shardlm.inspect import topologies

    for platform, extra in (("cuda", "topologies"), ("tpu", "tpu")):
        if not topologies.installed(platform):
            terminalreporter.write_line(
                f"not compiled afresh for {platform}, only read from recorded texts: its compiler is not installed "
                f"(pip install -e '.[{extra}]')"
            )
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        terminalreporter.write_line(
            "not compared afresh with transformers, only with what it computed once: it is not installed "
            "(pip install torch transformers)"
        )


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets the test use float64, in the test's own thread."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def x64_module() -> Iterator[None]:
    """Lets a whole module use float64, its module-scoped fixtures included.

    It lasts to the end of the module, so name it for all tests: `pytestmark = pytest.mark.usefixtures("x64_module")`.
    """
    with jax.enable_x64(True):
        yield
