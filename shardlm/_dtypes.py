"""Names of floating-point types: both spellings, and JAX's own objects, are taken wherever a dtype is given."""

from typing import Any

import jax.numpy as jnp

FLOATS = ("float32", "bfloat16", "float16", "float64")
SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16",
         "f64": "float64", "fp64": "float64", "half": "float16", "float": "float32", "double": "float64"}  # fmt: skip


def full_name(dtype: Any) -> Any:
    """The full name of a dtype: "bf16", `jnp.bfloat16` and `np.dtype("bfloat16")` are "bfloat16".

    What names no floating-point type comes back as it is, for the caller's own error.
    """
    if isinstance(dtype, str):
        return SHORT.get(dtype, dtype)
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        return dtype
    return name if dtype is not None and name in FLOATS else dtype
