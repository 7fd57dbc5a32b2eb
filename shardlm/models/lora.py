"""Low-rank adapters: put on a model, taken off it, and merged into it (arXiv:2106.09685)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from shardlm._arguments import check_usable, seed_of
from shardlm.models.config import Lora, TransformerConfig
from shardlm.models.kinds import kind, require_config, require_params
from shardlm.models.transformer import Transformer, parameter_dims

NAMES = ("lora_a", "lora_b")


def is_adapter(path: str) -> bool:
    """Whether the parameter at this path, "layers/attention/query/lora_a", is an adapter's."""
    return path.rsplit("/", 1)[-1] in NAMES


def adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters alone, of parameters or of a tree like them: what a fine-tuned model has to save.

    Args:
        params: a nested dict, such as `state.params`.

    Returns:
        The part of it whose leaves are named `lora_a` and `lora_b`; the same arrays.
    """
    require_params(params)
    check_usable(params, "adapters")
    return _only(params, lambda name: name in NAMES)


def without_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """The rest of what `adapters` gives."""
    return _only(params, lambda name: name not in NAMES)


def add_lora(
    config: TransformerConfig,
    params: Mapping[str, Any],
    lora: Lora,
    seed: int = 0,
    *,
    saved: Mapping[str, Any] | None = None,
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Put adapters on a model: the start of fine-tuning from loaded weights. With new ones it computes what it did.

    Args:
        config: without adapters.
        params: its parameters with the layers as [num_layers, ...], arrays of the host or of devices; kept as they are.
        lora: which adapters.
        seed: of the adapters' initial values, which are those of `Transformer(new config, rngs=nnx.Rngs(seed))`.
        saved: instead of new adapters, those of a model that was fine-tuned, as of `adapters`, layers in order.

    Returns:
        The new config and parameters, adapters split as their kernels are. `Trainer.init(params)` takes them to its
        layout; it adds adapters of its own seed to parameters that have none, also where a pipeline stores them.

    Raises:
        ValueError: there are adapters already, or parameters or saved adapters are not those of the model.

    Example:
        >>> config, params = sl.add_lora(config, params, sl.Lora(rank=8, targets=("query", "value")))
        >>> state = sl.Trainer(config, layout).init(params)
    """
    require_config(config)
    require_params(params)
    if config.lora is not None:
        raise ValueError(f"add_lora: this model has adapters: {config.lora}. Merge them first: sl.merge_lora")
    check_usable([params, saved], "add_lora")
    seed = seed_of(seed, "add_lora: seed")
    if not isinstance(lora, Lora):
        raise TypeError(f"lora is {kind(lora)}, not a sl.Lora: sl.Lora(rank=8, targets=('query', 'value')) makes one")
    config = dataclasses.replace(config, lora=lora)
    _, shapes, _ = parameter_dims(config)
    problems = _mismatches(params, without_adapters(shapes))
    problems += [] if saved is None else _mismatches(saved, adapters(shapes))
    if problems:
        raise ValueError(
            f"add_lora: {len(problems)} parameters are not those of the model with layers in order: "
            f"{'; '.join(problems[:10])}{' ...' * (len(problems) > 10)}"
        )
    if saved is not None:
        return config, _beside(params, saved)

    def new() -> dict[str, Any]:
        return adapters(nnx.to_pure_dict(nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))[1]))

    return config, _beside(params, jax.jit(new)())


def merge_lora(config: TransformerConfig, params: Mapping[str, Any]) -> tuple[TransformerConfig, dict[str, Any]]:
    """Add the adapters to the weights that they adapt, for a model without any that computes the same.

        W + (alpha / rank) A B, computed in the adapters' dtype, rounded once to W's

    Args:
        config: with adapters.
        params: its parameters on any layout, pipelines' too; they are not changed.

    Returns:
        The config without adapters, and its parameters, split as they were: the same bits on every layout.

    Raises:
        ValueError: the model has no adapters.
    """
    require_config(config)
    require_params(params)
    if config.lora is None:
        raise ValueError("merge_lora: this model has no adapters: config.lora is None")
    check_usable(params, "merge_lora")
    return dataclasses.replace(config, lora=None), _merged(params, config.lora.scale)


def _mismatches(params: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is missing, surplus, or of another shape or dtype, in words."""
    problems = []
    for name in (*expected, *(name for name in params if name not in expected)):
        path = f"{prefix}{name}"
        if name not in params or name not in expected:
            problems.append(f"{path} is {'missing' if name in expected else 'not expected'}")
        elif isinstance(expected[name], Mapping) != isinstance(params[name], Mapping):
            problems.append(f"{path} is {'an array' if isinstance(expected[name], Mapping) else 'no array'}")
        elif isinstance(expected[name], Mapping):
            problems += _mismatches(params[name], expected[name], f"{path}/")
        else:
            found, wanted = (f"{x.dtype}{list(x.shape)}" for x in (params[name], expected[name]))
            problems += [] if found == wanted else [f"{path} is {found}, expected {wanted}"]
    return problems


def _only(tree: Mapping[str, Any], wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            found |= {name: value} if wanted(name) else {}
        elif inner := _only(value, wanted):
            found[name] = inner
    return found


def _beside(params: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the adapters `new`, each split as the kernel beside it."""
    result = dict(params)
    for name, value in new.items():
        if isinstance(value, Mapping):
            result[name] = _beside(params[name], value)
        elif isinstance(getattr(kernel := params["kernel"], "sharding", None), NamedSharding):
            result[name] = jax.device_put(value, _sharding(kernel, new["lora_a"], new["lora_b"], name))
        else:
            result[name] = value
    return result


def _merged(tree: Mapping[str, Any], scale: float) -> dict[str, Any]:
    result = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result[name] = _merged(value, scale)
        elif name == "kernel" and "lora_a" in tree:
            result[name] = _sum(value, tree["lora_a"], tree["lora_b"], scale)
        elif name not in NAMES:
            result[name] = value
    return result


def _sum(kernel: Any, a: Any, b: Any, scale: float) -> Array:
    """W + scale A B, split as W is; no device sums over a part of the rank alone."""
    if not isinstance(getattr(kernel, "sharding", None), NamedSharding):
        return jax.jit(_add, static_argnums=(3, 4))(kernel, a, b, scale, _lead(kernel, a, b))
    a, b = (jax.device_put(x, _sharding(kernel, a, b, name)) for name, x in zip(NAMES, (a, b), strict=True))
    added = partial(_add, scale=scale, lead=_lead(kernel, a, b))
    return jax.block_until_ready(jax.jit(added, out_shardings=kernel.sharding)(kernel, a, b))


def _add(kernel: Array, a: Array, b: Array, scale: float, lead: int) -> Array:
    stacked = tuple(range(lead))
    dims = (((a.ndim - 1,), (lead,)), (stacked, stacked))
    product = lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype)
    return (kernel.astype(a.dtype) + jnp.asarray(scale, a.dtype) * product).astype(kernel.dtype)


def _lead(kernel: Any, a: Any, b: Any) -> int:
    """How many leading dims stack layers: kernel[*lead, *in, *out], a[*lead, *in, rank], b[*lead, rank, *out]."""
    return a.ndim + b.ndim - 2 - kernel.ndim


def _sharding(kernel: Any, a: Any, b: Any, name: str) -> NamedSharding:
    """The kernel's sharding of the dims that an adapter shares with it."""
    spec = (*kernel.sharding.spec, *(None,) * (kernel.ndim - len(kernel.sharding.spec)))
    lead = _lead(kernel, a, b)
    inward = a.ndim - 1
    own = (*spec[:inward], None) if name == NAMES[0] else (*spec[:lead], None, *spec[inward:])
    return NamedSharding(kernel.sharding.mesh, PartitionSpec(*own))
