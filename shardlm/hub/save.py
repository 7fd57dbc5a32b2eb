"""Parameters of any layout to a Hugging Face folder that transformers reads."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from shardlm._arguments import check_usable
from shardlm.checkpoint.processes import is_first
from shardlm.hub.fields import raise_problems
from shardlm.hub.files import DTYPES, folder_of, read_config
from shardlm.hub.finite import all_finite, warn_of
from shardlm.hub.harmless import HARMLESS
from shardlm.hub.match import expected
from shardlm.hub.origin import Origin
from shardlm.hub.registry import family_of_config
from shardlm.hub.table import Placed, Tensor
from shardlm.hub.tokenizer import text_files, token_ids, tokenizer_files
from shardlm.hub.write import Output, check_target, parse_size, write_folder
from shardlm.layout import Axis
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config, require_params
from shardlm.models.transformer import parameter_dims
from shardlm.train.engine import flatten

_TABLES = ("embedding/table", "head/table")  # which layouts pad differently


def save_hf(
    folder: str | os.PathLike,
    config: TransformerConfig,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    *,
    overwrite: bool = False,
    family: str | None = None,
    fields: Mapping[str, Any] | None = None,
    like: str | os.PathLike | None = None,
    verbose: bool = True,
) -> None:
    """Write a model so that transformers, and whoever reads its files, loads it.

    What the folder said that the model was loaded from goes out again: the fields of config.json that no computation
    needs, generation_config.json, and the tokenizer's files as they were. `config.origin` and the tokenizer carry it.

    The folder has its name once all is in it: a kill before that leaves nothing at `folder`, or what was there. The
    host holds one tensor of the files at a time. In a run of several processes all call this, and the first writes.

    Args:
        folder: to be made; it must not exist, or be empty.
        config: of the model.
        params: as `TrainState.params`: global arrays on any layout, or NumPy's, layers in the model's order (of a
            pipeline with chunks or uneven stages `Trainer.in_order` gives them). They are written in the dtype that
            they have; padding of the vocabulary is left out.
        tokenizer: written beside the model: of `load_hf`, a `sl.data.BPETokenizer` or a `tokenizers.Tokenizer`.
        max_shard_size: bytes of tensors in a file, a number or text such as "5GB".
        overwrite: replace the model at `folder`. Anything else there is refused all the same.
        family: what to write it as: "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2";
            None is that of the folder which the model was loaded from, or the first of these that can say all of
            `config`.
        fields: more of config.json, of those that do not change what the model computes, such as
            `max_position_embeddings`.
        like: a Hugging Face folder whose config.json, generation_config.json and, where no tokenizer is given, files of
            its text go out with the model, in the place of what `config.origin` holds.
        verbose: show a progress bar, where the output is a terminal.

    Warns:
        UserWarning: parameters are NaN or infinite.

    Raises:
        ValueError: no family is this configuration, with the reasons; parameters that are missing, too many, or of a
            wrong shape or dtype; there is something at `folder`; an argument is out of range.
        TypeError: a tokenizer that cannot be written.

    Example:
        >>> sl.save_hf("tuned", trainer.config, state.params, tokenizer)
    """
    require_config(config)
    require_params(params)
    if config.lora is not None:
        raise ValueError(
            "save_hf: this model has adapters: merge them first (sl.merge_lora), or save them (sl.save_lora)"
        )
    origin, texts = Origin.of_config(config), {}
    if like is not None:
        path = folder_of(like)
        origin, texts = Origin.of_folder(path, read_config(path)), text_files(path)
    chosen = family_of_config(config, family, origin.values.get("model_type"))
    check_usable(params, "save_hf")
    _check_params(config, params)
    more = dict(fields or {})
    if unknown := sorted(set(more) - set(HARMLESS)):
        raise ValueError(f"fields: {', '.join(unknown)} may change what the model computes, which config alone says")
    parse_size(max_shard_size)
    texts = (texts if tokenizer is None else tokenizer_files(tokenizer)) | origin.text_files(tokenizer)
    target = check_target(folder, overwrite)
    flat = flatten(params)
    dtype = str(np.dtype(next(iter(flat.values())).dtype))
    ids = {} if origin.is_of(tokenizer) else token_ids(tokenizer)
    values = origin.config_values(config, chosen, dtype) | ids | more
    _, wanted = expected(config, chosen)
    broken: set[str] = set()
    outputs = [
        Output(tensor.name, tensor.shape, np.dtype(flat[tensor.parts[0][0]].dtype), _maker(tensor, flat, broken))
        for tensor in wanted
    ]
    write_folder(target, outputs, values, texts, max_shard_size, verbose, overwrite=overwrite)
    warn_of(broken if is_first() else (), str(target), dtype, "was written")


def _check_params(config: TransformerConfig, params: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are parameters of the configuration, of one dtype, with layers in order."""
    _, shapes, _ = parameter_dims(config)
    wanted, given = flatten(shapes), flatten(params)
    problems = []
    dtypes: dict[str, list[str]] = {}
    for path in wanted | given:
        if path not in given:
            problems.append(f"{path} is missing, of shape {wanted[path].shape}")
            continue
        shape, dtype = np.shape(given[path]), getattr(given[path], "dtype", None)
        if path not in wanted:
            problems.append(f"{path}, of shape {shape}, is no parameter of this configuration")
            continue
        dtypes.setdefault(str(dtype), []).append(path)
        rows = path in _TABLES and shape[:1] >= (config.vocab_size,) and shape[1:] == wanted[path].shape[1:]
        if shape != wanted[path].shape and not rows:
            problems.append(f"{path} has the shape {shape}, and {wanted[path].shape} by the configuration")
    legal = {str(dtype) for dtype in DTYPES.values()}
    if len(dtypes) > 1 or not set(dtypes) <= legal:
        told = ", ".join(f"{len(paths)} of {dtype} such as {paths[0]}" for dtype, paths in dtypes.items())
        problems.append(f"the parameters are {told}; they must be of one dtype of {', '.join(sorted(legal))}")
    if problems and any(_is_on_stages(leaf) for leaf in given.values()):
        problems.append("of a pipeline with chunks or uneven stages give trainer.in_order(state).params")
    raise_problems("these are not the parameters of this configuration", problems)


def _is_on_stages(leaf: Any) -> bool:
    return (
        isinstance(leaf, Array)
        and isinstance(leaf.sharding, NamedSharding)
        and leaf.sharding.mesh.shape.get(str(Axis.PIPE), 1) > 1
    )


def _maker(tensor: Tensor, params: Mapping[str, Any], broken: set[str]) -> Callable[[], np.ndarray]:
    """What makes the tensor of the files from the parameters, and adds its name to `broken` if it is not finite."""

    def make() -> np.ndarray:
        parts = [_part(where, params[path], tensor.layer) for path, where in tensor.parts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if is_first() and not all_finite(whole):
            broken.add(tensor.name)
        return whole

    return make


def _part(where: Placed, leaf: Any, layer: int | None) -> np.ndarray:
    return where.write(np.asarray(leaf if layer is None else leaf[layer]) if _on_host(leaf) else _fetch(leaf, layer))


def _on_host(leaf: Any) -> bool:
    return not isinstance(leaf, Array)


def _fetch(leaf: Array, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it, on the host; of several processes all call this."""
    if not leaf.is_fully_addressable:
        return np.asarray(_gather(leaf, layer).addressable_data(0))
    result = np.empty(leaf.shape if layer is None else leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            if layer is None:
                result[shard.index] = np.asarray(shard.data)
            elif layer in range(*shard.index[0].indices(leaf.shape[0])):
                held, data = layer - (shard.index[0].start or 0), shard.data
                # On a CPU the array is a view of the device's memory; elsewhere only the layer is to come to the host.
                part = np.asarray(data)[held] if shard.device.platform == "cpu" else np.asarray(data[held])
                result[shard.index[1:]] = part
    return result


def _gather(leaf: Array, layer: int | None) -> Array:
    """The same on every device, by the compiler's collectives: no process holds all of it."""
    assert isinstance(leaf.sharding, NamedSharding)
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    if layer is None:
        return jax.block_until_ready(jax.jit(lambda x: x, out_shardings=whole)(leaf))
    return jax.block_until_ready(_take(whole)(leaf, jnp.int32(layer)))


_compiled: dict[NamedSharding, Callable[[Array, Array], Array]] = {}


def _take(whole: NamedSharding) -> Callable[[Array, Array], Array]:
    if whole not in _compiled:
        _compiled[whole] = jax.jit(
            lambda x, layer: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), out_shardings=whole
        )
    return _compiled[whole]
