"""Low-rank adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors.

Names and shapes are those of https://huggingface.co/docs/peft/developer_guides/checkpoint: of a linear layer
`base_model.model.{its name}.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank], the product multiplied by
`lora_alpha / r`.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlm._arguments import check_usable
from shardlm.hub.adapter_config import Adapted, read_adapter_config
from shardlm.hub.adapter_matrices import Matrix, Piece, join, matrices_of, other_modules, split, stacked, unstacked
from shardlm.hub.files import import_safetensors, read_json
from shardlm.models.config import TARGETS, Lora, TransformerConfig
from shardlm.models.kinds import require_config, require_params
from shardlm.models.lora import add_lora
from shardlm.runtime.folders import Work, keep_others, recover, sweep
from shardlm.runtime.paths import local_path
from shardlm.train.paths import flatten, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHOWN = 10  # problems in one message


def save_lora(
    folder: str | os.PathLike,
    config: TransformerConfig,
    params: Mapping[str, Any],
    *,
    base: str | os.PathLike | None = None,
) -> None:
    """Write a model's adapters alone, so that PEFT puts them on the model of transformers.

    A projection that is not adapted in a layer, as `load_lora` reads them, is not in the files. GPT-2 keeps query, key
    and value in one matrix; where training made their A differ, that matrix has adapters of the sum of their ranks.

    Args:
        folder: to be made, or that of adapters to be replaced.
        config: with `lora`.
        params: of the model or its adapters alone, layers as [num_layers, ...] in order: arrays of the host, or of
            devices, whatever their layout; of a pipeline with chunks or uneven stages `Trainer.in_order` gives them.
        base: name or folder of the model that the adapters are for, to be noted; default `config.lora.base`, which is
            what `load_lora` read.

    Raises:
        ValueError: the model has no adapters; or parameters are not the model's, or not finite.

    Example:
        >>> sl.save_lora("adapters", trainer.config, state.params, base="Qwen/Qwen3-0.6B")
    """
    require_params(params)
    lora = require_config(config).lora
    if lora is None:
        raise ValueError("save_lora: this model has no adapters: config.lora is None")
    check_usable(params, "save_lora")
    matrices = matrices_of(config)
    tensors, ranks = _tensors(config, matrices, flatten(params))
    rank = Counter(ranks.values()).most_common(1)[0][0]
    different = {name: r for name, r in ranks.items() if r != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base if base is None else os.fspath(base),
        "r": rank,
        "lora_alpha": lora.alpha if rank == lora.rank else lora.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(list(ranks), _names(config, matrices)),
        "rank_pattern": different,
        "alpha_pattern": {name: lora.scale * r for name, r in different.items()},
        "bias": "none",
        "fan_in_fan_out": matrices[0].turned,
        "inference_mode": True,
    }
    target = local_path(folder, "folder")
    if target.is_symlink():
        raise ValueError(f"save_lora: {target} is a symbolic link: give the path of the folder itself")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file())):
        raise ValueError(f"save_lora: {target} exists and is no folder of adapters: choose another path")
    package = _safetensors()
    sweep(target.parent, lambda name: name == target.name)
    work = Work(target)
    try:
        keep_others(target, work.new, (CONFIG, WEIGHTS))
        package.save_file(tensors, work.new / WEIGHTS, metadata={"format": "pt"})
        (work.new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        work.publish(replace=True)
    finally:
        with contextlib.suppress(OSError):  # of what failed; nothing where it is published
            work.remove()


def load_lora(
    folder: str | os.PathLike,
    config: TransformerConfig,
    params: Mapping[str, Any],
    *,
    ignore_fields: Collection[str] = (),
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Put adapters from a folder of PEFT on a model.

    Names in `target_modules` and similar fields are matched as PEFT does, regular expressions too. Projections may
    differ in rank and scale, and layers may have none: the model computes what PEFT's does
    (`hub/adapter_matrices.py` says how). Adapters that change the model's own weights (PiSSA, OLoRA, ...), or that are
    more than a low-rank product (DoRA, biases, ...), are an error that names the setting.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: of the model, without adapters.
        params: its parameters, as of `load_hf`, layers as [num_layers, ...]; kept as they are.
        ignore_fields: fields of adapter_config.json that shardlm does not know, and that change nothing.

    Returns:
        The config with `lora`, and the parameters with adapters, split as their kernels are: as of `sl.add_lora`.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: a setting that our adapters do not have, named; tensors that are missing, too many, of another
            shape or not finite, listed; the model has adapters already.

    Example:
        >>> config, params, _ = sl.load_hf("Qwen3-0.6B", layout)
        >>> config, params = sl.load_lora("adapters", config, params)
    """
    require_config(config)
    require_params(params)
    path = local_path(folder, "folder")
    recover(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            pickled = name == WEIGHTS and (path / "adapter_model.bin").is_file()
            advice = (
                ", but adapter_model.bin, a pickle, which can run any code when it is read: load it with PEFT once, "
                "and save_pretrained(..., safe_serialization=True)"
            )
            raise FileNotFoundError(f"load_lora: {path} has no {name}{advice if pickled else ''}")
    settings, matrices = read_json(path / CONFIG), matrices_of(config)
    names = _names(config, matrices)
    chosen = read_adapter_config(settings, str(path / CONFIG), names, other_modules(config), ignore_fields)
    dtype = np.float64 if config.param_dtype == "float64" else np.float32
    pieces = _pieces(config, matrices, chosen, path / WEIGHTS, dtype)
    lora = _lora(pieces, settings)
    return add_lora(config, params, lora, saved=unflatten(stacked(config, matrices, pieces, lora.rank, lora.scale)))


def _names(config: TransformerConfig, matrices: Sequence[Matrix]) -> list[str]:
    return [matrix.name.format(layer=layer) for matrix in matrices for layer in range(config.num_layers)]


def _pieces(
    config: TransformerConfig, matrices: Sequence[Matrix], chosen: Mapping[str, Adapted], path: Path, dtype: Any
) -> list[Piece]:
    """What the file of tensors holds of the chosen modules; all that is wrong in it is one error."""
    package = import_safetensors()
    try:
        stored = _safetensors().load_file(path)
    except package.SafetensorError as error:
        raise ValueError(f"load_lora: {path} is damaged or cut short: {error}. Fetch it again") from error
    pieces, problems = [], []
    for matrix in matrices:
        for layer in range(config.num_layers):
            name = matrix.name.format(layer=layer)
            if name not in chosen:
                continue
            rank, parts = chosen[name].rank, []
            for part, shape in (("A", (rank, matrix.width)), ("B", (sum(matrix.outputs), rank))):
                tensor = f"{_PREFIX}{name}.lora_{part}.weight"
                value, wrong = _checked(stored.pop(tensor, None), shape, dtype)
                parts.append(value)
                problems += [f"{tensor} {wrong}"] if wrong else []
            if not problems:
                pieces += split(matrix, layer, *parts, chosen[name].scale)
    problems += [f"{name} is of no projection that {CONFIG} names" for name in sorted(stored)]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"load_lora: {path} does not fit: {'; '.join(problems[:_SHOWN])}{more}")
    return pieces


def _checked(found: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, str]:
    """The tensor in `dtype`, and what is wrong with it, if anything."""
    if found is None:
        return np.zeros(0), f"is missing, of shape {list(shape)}"
    if found.shape != shape:
        return found, f"is {list(found.shape)}, not {list(shape)}"
    if found.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        return found, f"is {found.dtype}, and weights are float32, float16 or bfloat16"
    value = found.astype(dtype)
    bad = int((~np.isfinite(value)).sum())
    return value, f"has {bad} values that are not finite" if bad else ""


def _lora(pieces: Sequence[Piece], settings: Mapping[str, Any]) -> Lora:
    """The largest rank, and the scale that most have: the file's own r and lora_alpha where all have these."""
    rank = max(len(piece.a) for piece in pieces)
    scale = Counter(piece.scale for piece in pieces).most_common(1)[0][0]
    alpha = settings["lora_alpha"] if scale == settings["lora_alpha"] / rank else scale * rank
    named = {piece.path.split("/")[-1] for piece in pieces}
    base = settings.get("base_model_name_or_path")
    return Lora(
        rank=rank,
        alpha=float(alpha),
        targets=tuple(target for target in TARGETS if target in named),
        base=base if isinstance(base, str) else None,
    )


def _tensors(
    config: TransformerConfig, matrices: Sequence[Matrix], flat: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors of the file, and the rank of each module that they adapt."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    problems: list[str] = []
    for matrix in matrices:
        for layer, pieces in enumerate(unstacked(config, matrix, flat, problems)):
            name = matrix.name.format(layer=layer)
            a, b = join(matrix, pieces)
            if len(a):
                ranks[name] = len(a)
                tensors |= {f"{_PREFIX}{name}.lora_A.weight": a, f"{_PREFIX}{name}.lora_B.weight": b}
    if problems:
        raise ValueError(f"save_lora: these are not the adapters of this configuration: {'; '.join(problems)}")
    if not tensors:
        raise ValueError("save_lora: A and B of all adapters are zero: there is nothing to save")
    return tensors, ranks


def _target_modules(names: Sequence[str], projections: Sequence[str]) -> list[str]:
    """Names for target_modules: the last parts where these say the same projections, else the whole names."""
    short = list(dict.fromkeys(name.split(".")[-1] for name in names))
    told = {name for name in projections if name.split(".")[-1] in short}
    return short if told == set(names) else list(names)


def _safetensors() -> Any:
    import_safetensors()
    import safetensors.numpy

    return safetensors.numpy
