"""The settings of XLA under which tests compile, in their own process and in those that they start.

Compilation is most of the tests' time, and tiny programs gain nothing from optimised machine code: XLA's backend level
0 halves it. What is left is mostly LLVM's work on fused loops, of which the emitters before jaxlib 0.11 make a third
(CPU seconds of `compile()`, four steps of tests/train/test_same_numbers.py: 34.8, and 11.7 with them). Neither changes
which programs there are, their buffers or their collectives.
"""

import os

import jaxlib.version

_VERSION = tuple(int(part) for part in jaxlib.version.__version__.split(".")[:2])
_FAST = "--xla_backend_optimization_level=0" + (" --xla_cpu_use_fusion_emitters=false" if _VERSION < (0, 11) else "")


def flags() -> str:
    """What XLA_FLAGS is to be, the user's own last."""
    return f"{_FAST} {os.environ.get('XLA_FLAGS', '')}".rstrip()
