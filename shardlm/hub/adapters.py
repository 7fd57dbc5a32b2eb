"""Low-rank adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors.

Names and shapes are those of https://huggingface.co/docs/peft/developer_guides/checkpoint: of a linear layer
`base_model.model.{its name}.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], the product multiplied by
`lora_alpha / r`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardlm.hub.files import import_safetensors, read_json
from shardlm.hub.registry import family_of_config
from shardlm.hub.table import Row
from shardlm.models.config import Lora, TransformerConfig
from shardlm.models.kinds import require_config, require_params
from shardlm.models.lora import add_lora
from shardlm.train.paths import flatten, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What must be so, where a file says it; all else but rank, alpha and targets changes nothing that adapters compute.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_rslora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False,),
}


def save_lora(
    folder: str | os.PathLike, config: TransformerConfig, params: Mapping[str, Any], *, base: str | None = None
) -> None:
    """Write a model's adapters alone, so that PEFT puts them on the model of transformers.

    Args:
        folder: to be made, or that of adapters to be replaced.
        config: with `lora`.
        params: of the model or its adapters alone, layers as [num_layers, ...] in order: arrays of the host, or of
            devices, whatever their layout; of a pipeline with chunks or uneven stages `Trainer.in_order` gives them.
        base: name or folder of the model that the adapters are for, to be noted.

    Raises:
        ValueError: the model has no adapters, or ones that PEFT's files cannot say; or parameters are not the model's.

    Example:
        >>> sl.save_lora("adapters", trainer.config, state.params, base="Qwen/Qwen3-0.6B")
    """
    require_params(params)
    lora = require_config(config).lora
    if lora is None:
        raise ValueError("save_lora: this model has no adapters: config.lora is None")
    flat, tensors, problems = flatten(params), {}, []
    for target, row in _rows(config, lora.targets):
        path = row.path.rsplit("/", 1)[0]
        a, b = (flat.get(f"{path}/{name}") for name in ("lora_a", "lora_b"))
        if a is None or b is None or len(a) != config.num_layers or len(b) != config.num_layers:
            found = "missing" if a is None or b is None else f"of {len(a)} layers, not {config.num_layers}"
            problems.append(f"the adapter of {target} ({path}/lora_a, lora_b) is {found}")
            continue
        a, b = (np.asarray(x) for x in (a, b))
        for layer in range(config.num_layers):
            name = _name(row, layer)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, lora.rank).T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(lora.rank, -1).T)
    if problems:
        raise ValueError(f"save_lora: these are not the adapters of this configuration: {'; '.join(problems)}")
    modules = [_module(row) for _, row in _rows(config, lora.targets)]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file())):
        raise ValueError(f"save_lora: {target} exists and is no folder of adapters: choose another path")
    target.mkdir(parents=True, exist_ok=True)
    _safetensors().save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def load_lora(
    folder: str | os.PathLike, config: TransformerConfig, params: Mapping[str, Any]
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Put adapters from a folder of PEFT on a model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: of the model, without adapters.
        params: its parameters, as of `load_hf`, layers as [num_layers, ...]; kept as they are.

    Returns:
        The config with `lora`, and the parameters with adapters, split as their kernels are: as of `sl.add_lora`.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: a setting that our adapters do not have, named; tensors that are missing, too many or of another
            shape, listed; the model has adapters already.

    Example:
        >>> config, params, _ = sl.load_hf("Qwen3-0.6B", layout)
        >>> config, params = sl.load_lora("adapters", config, params)
    """
    require_config(config)
    require_params(params)
    path = Path(folder).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"load_lora: {path} has no {name}")
    settings = read_json(path / CONFIG)
    rows = {_module(row): (target, row) for target, row in _rows(config, None)}
    lora = _lora(settings, {module: target for module, (target, _) in rows.items()}, path)
    stored = _safetensors().load_file(path / WEIGHTS)
    adapted = [row for target, row in rows.values() if target in lora.targets]
    flat, problems = {}, []
    inner = {"head": config.num_heads, "kv_head": config.num_kv_heads, "head_dim": config.head_dim}
    inner |= {"embed": config.d_model, "mlp": config.d_ff}
    for row in adapted:
        outward, inward = (tuple(inner[dim] for dim in group) for group in row.groups)
        shapes = {"A": (lora.rank, int(np.prod(inward))), "B": (int(np.prod(outward)), lora.rank)}
        layers: dict[str, list[np.ndarray]] = {"A": [], "B": []}
        for layer in range(config.num_layers):
            for part, shape in shapes.items():
                name = f"{_name(row, layer)}.lora_{part}.weight"
                found = stored.pop(name, None)
                if found is None or found.shape != shape:
                    problems.append(f"{name} is {'missing' if found is None else list(found.shape)}, not {list(shape)}")
                else:
                    layers[part].append(found.T)
        if not problems:
            base = row.path.rsplit("/", 1)[0]
            dtype = np.promote_types(np.float32, config.param_dtype) if config.param_dtype == "float64" else np.float32
            flat[f"{base}/lora_a"] = np.stack(layers["A"]).reshape(-1, *inward, lora.rank).astype(dtype)
            flat[f"{base}/lora_b"] = np.stack(layers["B"]).reshape(-1, lora.rank, *outward).astype(dtype)
    problems += [f"{name} is of no projection that {CONFIG} names" for name in stored]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"load_lora: {path / WEIGHTS} does not fit: {'; '.join(problems[:10])}{more}")
    return add_lora(config, params, lora, saved=unflatten(flat))


def _rows(config: TransformerConfig, targets: tuple[str, ...] | None) -> Iterator[tuple[str, Row]]:
    """The name that we have for a projection, and its row in the family's table; None: of all that could be adapted."""
    family = family_of_config(dataclasses.replace(config, lora=None))
    for row in family.rows:
        kind, target, leaf = row.path.split("/")[-3:] if row.stacked else ("", "", "")
        if kind not in ("attention", "mlp") or leaf != "kernel" or (targets is not None and target not in targets):
            continue
        if row.part != (0, 1):
            raise ValueError(
                f"{family.model_type} keeps {target} in one matrix with others ({row.name}), so its adapters are not "
                "those of PEFT: merge them (sl.merge_lora) and save the model"
            )
        yield target, row


def _safetensors() -> Any:
    import_safetensors()
    import safetensors.numpy

    return safetensors.numpy


def _module(row: Row) -> str:
    return row.name.split(".")[-2]


def _name(row: Row, layer: int) -> str:
    return f"base_model.model.{row.name.format(layer=layer).removesuffix('.weight')}"


def _lora(settings: Mapping[str, Any], targets: Mapping[str, str], path: Path) -> Lora:
    problems = [
        f"{key}={settings[key]!r}, not {expected[0]!r}"
        for key, expected in _EXPECTED.items()
        if key in settings and settings[key] not in expected
    ]
    given = settings.get("target_modules")
    modules: list[Any] = given if isinstance(given, list) else []
    if not modules or not set(modules) <= set(targets):
        problems.append(f"target_modules={given!r}, not a list of {', '.join(targets)}")
    problems += [f"{key} is missing" for key in ("r", "lora_alpha") if key not in settings]
    if problems:
        raise ValueError(f"load_lora: {path / CONFIG} has settings that our adapters do not: {'; '.join(problems)}")
    named = tuple(target for module, target in targets.items() if module in modules)
    return Lora(rank=settings["r"], alpha=float(settings["lora_alpha"]), targets=named)
