"""The fields of an adapter_config.json: which projections of a model it adapts, each with its rank and its scale.

Meanings are those of PEFT's `LoraConfig` (https://huggingface.co/docs/peft/package_reference/lora). Every field is
read, is known to change nothing that adapters compute, or is an error that names it: an adapter whose weights mean
something else has tensors of the same names and shapes.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardlm._errors import is_int
from shardlm.hub.fields import Fields
from shardlm.hub.kinds import is_number
from shardlm.hub.patterns import compile_pattern

_HARMLESS = {
    "says where the file came from": "auto_mapping base_model_name_or_path peft_version revision",
    "in training alone; our adapters have no dropout": "lora_dropout inference_mode",
    "settings of how adapters begin, which init_lora_weights chooses": """corda_config eva_config loftq_config
        lora_ga_config""",
    "how the model's own weights are stored; the adapters' are the same either way": "fan_in_fan_out merge_weights",
    "settings of what another field switches on": "ensure_weight_tying layers_pattern megatron_core qalora_group_size",
    "where PEFT computes": "runtime_config",
}
HARMLESS = {name: why for why, names in _HARMLESS.items() for name in names.split()}

_NONE: tuple[Any, ...] = (None, [], {})
NOTHING_AT: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None,), "adapters that act from certain tokens of a text on"),
    "arrow_config": ((None,), "several adapters with a router between them"),
    "bias": (("none", None), "biases of the model that were trained too"),
    "enable_lora": ((None,), "adapters on parts of a matrix"),
    "kasa_config": ((None,), "singular values cut from the model's own weights"),
    "layer_replication": (_NONE, "a model some of whose layers are repeated"),
    "lora_bias": ((False, None), "a bias in the adapters"),
    "megatron_config": ((None,), "layers of Megatron"),
    "modules_to_save": (_NONE, "modules of the model that were trained whole"),
    "monteclora_config": ((None,), "adapters that are drawn at random"),
    "target_parameters": (_NONE, "adapters on parameters that are no projection"),
    "task_type": (("CAUSAL_LM", None), "a head for another task than language modelling"),
    "trainable_token_indices": (_NONE, "rows of the embedding that were trained"),
    "use_bdlora": ((None, False), "adapters of blocks on the diagonal"),
    "use_dora": ((False, None), "weights split into direction and magnitude"),
    "use_qalora": ((False, None), "inputs averaged in groups before the adapters"),
    "velora_config": ((None,), "another backward pass"),
}

_LARGEST = float(np.finfo(np.float32).max)

# How A and B began. Only the first ones leave the weights of the model as they are.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_MOVES = {
    "pissa": "subtracts the largest singular vectors from the weights",
    "olora": "subtracts part of a QR decomposition from the weights",
    "corda": "subtracts singular vectors that activations choose from the weights",
    "lora_ga": "subtracts singular vectors of a gradient from the weights",
    "loftq": "replaces the weights by quantised ones",
}


# The fields that `read_adapter_config` takes.
READ = frozenset(
    ("alpha_pattern", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type", "r")
    + ("rank_pattern", "target_modules", "use_rslora")
)


@dataclass(frozen=True)
class Adapted:
    """What the file says of one projection of one layer.

    Attributes:
        rank: rows of its A.
        scale: what multiplies B A x.
    """

    rank: int
    scale: float


def read_adapter_config(
    values: Mapping[str, Any],
    where: str,
    projections: Sequence[str],
    others: Sequence[str],
    ignore_fields: Collection[str] = (),
) -> dict[str, Adapted]:
    """The projections that are adapted, by their names in the model.

    Args:
        values: what the file holds.
        where: what errors call it.
        projections: names of the modules that can be adapted, such as "model.layers.0.self_attn.q_proj".
        others: names of the model's other modules with weights, the embedding and the head among them.
        ignore_fields: unknown fields to leave out.

    Raises:
        ValueError: a field is unknown, or has a value with another meaning than our adapters have; all are listed.
    """
    if known := sorted(set(ignore_fields) & {*HARMLESS, *NOTHING_AT, *READ}):
        raise ValueError(
            f"ignore_fields has {', '.join(known)}, which {where} needs: only unknown fields can be ignored"
        )
    fields = Fields(
        values, where, ignore_fields, harmless=HARMLESS, nothing_at=NOTHING_AT, what="shardlm's adapters have"
    )
    if fields.take("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type={values.get('peft_type')!r}; shardlm reads 'LORA'")
    _check_beginning(fields)
    chosen = _chosen(fields, projections, others)
    ranks = _Numbers(fields, "r", "rank_pattern", is_int, "a whole number from 1")
    alphas = _Numbers(fields, "lora_alpha", "alpha_pattern", _is_real, "a number above 0")
    rooted = fields.take("use_rslora", False)
    if not isinstance(rooted, bool | None):
        fields.refuse("use_rslora", "it is true or false")
    fields.finish()
    found = {}
    for name in chosen:
        rank, alpha = ranks.of(name), alphas.of(name)
        found[name] = Adapted(rank, alpha / (math.sqrt(rank) if rooted else rank))
    return found


def _check_beginning(fields: Fields) -> None:
    """Refuse adapters that began by changing the model's weights, without which they are something else."""
    value = fields.take("init_lora_weights", True)
    if isinstance(value, str):
        value = value.lower()
    if any(value is legal or (isinstance(value, str) and value == legal) for legal in _BEGINNINGS):
        return
    kind = next((kind for kind in _MOVES if isinstance(value, str) and value.startswith(kind)), None)
    if kind is None:
        return fields.refuse("init_lora_weights", f"legal are {', '.join(map(repr, _BEGINNINGS))}")
    fields.refuse(
        "init_lora_weights",
        f"{kind} {_MOVES[kind]} of the model before training, so these adapters do not fit the model as it is. In "
        "PEFT, save_pretrained(..., path_initial_model_for_weight_conversion=...) writes them as plain ones, or "
        "merge_and_unload() gives a model to save",
    )


def _chosen(fields: Fields, projections: Sequence[str], others: Sequence[str]) -> list[str]:
    """The projections that target_modules names, as PEFT matches names."""
    targets = fields.take("target_modules")
    excluded = fields.take("exclude_modules", None)
    layers = fields.take("layers_to_transform", None)
    numbers = [layers] if is_int(layers) else layers
    if not (numbers is None or (isinstance(numbers, list) and all(is_int(n) for n in numbers))):
        fields.refuse("layers_to_transform", "it is the number of a layer, a list of numbers, or null")
        numbers = None
    if numbers and isinstance(targets, str):
        fields.refuse("layers_to_transform", "it goes with a list of target_modules, not with a string")
    patterns = fields.take("layers_pattern", None)
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    try:
        if isinstance(targets, str) and targets.lower() == "all-linear":
            matched = list(projections)
        else:
            matched = [x for x in (*projections, *others) if _matches("target_modules", targets, x)]
            if not isinstance(targets, str) and numbers:  # whole names are taken in whatever layer
                matched = [x for x in matched if x in targets or _layer(x, patterns) in numbers]
        if excluded:
            matched = [x for x in matched if not _matches("exclude_modules", excluded, x)]
    except (TypeError, ValueError) as error:
        fields.problems.append(str(error))
        return []
    if beside := [x for x in matched if x in others]:
        fields.refuse(
            "target_modules",
            f"it names {', '.join(beside[:3])}{' and more' * (len(beside) > 3)}; adapters here are on the projections "
            "of attention and feed-forward layers alone",
        )
    elif not matched:
        short = dict.fromkeys(x.split(".")[-1] for x in projections)
        fields.refuse("target_modules", f"it names none of the model's projections, which are {', '.join(short)}")
    return matched


def _matches(field: str, names: Any, module: str) -> bool:
    """Whether a regular expression is the whole name, or one of a list is the name or the end of it."""
    if isinstance(names, str):
        try:
            return compile_pattern(names).fullmatch(module) is not None
        except ValueError as error:
            raise ValueError(f"{field}={names!r}: {error}") from error
    if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
        raise TypeError(f"{field}={names!r}: it is a list of names, or one regular expression")
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(module: str, patterns: Sequence[str] | None) -> int | None:
    """The number of the layer in a module's name: the first one that follows what `patterns` names, or anything."""
    for pattern in patterns or ():
        try:
            compile_pattern(pattern)
        except ValueError as error:
            raise ValueError(f"layers_pattern={pattern!r}: {error}") from error
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for e in expressions if (m := re.match(e, module))), None)
    return None if found is None else int(found[1])


class _Numbers:
    """A field that holds one number for all projections, and one with others for those that its patterns match."""

    def __init__(self, fields: Fields, name: str, pattern: str, is_legal: Any, what: str):
        self.value = fields.take(name)
        patterns = fields.take(pattern, None)
        self._patterns: dict[str, Any] = dict(patterns) if isinstance(patterns, Mapping) else {}
        if patterns is not None and not isinstance(patterns, Mapping):
            fields.refuse(pattern, "it is an object of patterns and numbers")
        given: Iterator[tuple[str, Any]] = iter([(name, self.value)] if name in fields.values else [])
        for where, value in (*given, *((f"{pattern}[{key!r}]", x) for key, x in self._patterns.items())):
            if not is_legal(value) or value <= 0:
                fields.problems.append(f"{where}={value!r}: it is {what}")
        for key in self._patterns:
            try:
                compile_pattern(key)
            except ValueError as error:
                fields.problems.append(f"{pattern}[{key!r}]: {error}")

    def of(self, module: str) -> Any:
        """Of one module: the first pattern that matches an end of its name, after a dot, counts."""
        keys = (key for key in self._patterns if re.match(rf"(.*\.)?({key})$", module))
        return self._patterns.get(next(keys, None), self.value)  # type: ignore[arg-type]


def _is_real(value: Any) -> bool:
    return is_number(value) and (value == 0 or float(np.finfo(np.float32).tiny) <= abs(value) <= _LARGEST)
