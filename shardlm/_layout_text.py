"""A layout as text: "data=2,fsdp=4,sequence_parallel" to settings, and the names that other libraries have for ours."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

# What people who come from elsewhere write: Megatron, DeepSpeed, FSDP, TorchTitan, MaxText and the papers.
ELSEWHERE = {
    "data": "dp ddp dp_replicate data_parallel data_parallel_size replica replicas",
    "fsdp": "dp_shard fully_sharded fsdp_size hsdp",
    "tensor": "tp tensor_parallel tensor_parallel_size mp model model_parallel mdl",
    "pipe": "pp pipeline_parallel pipeline_parallel_size pipeline_stages stages stage",
    "context": "cp context_parallel_size sequence_axis ring",
    "expert": "ep expert_parallel expert_parallel_size experts",
    "sequence_parallel": "sp seq_parallel sequence seq",
    "accumulate": "ga grad_accum gradient_accumulation gradient_accumulation_steps accumulation microbatches "
    "grad_acc accum",
    "zero": "zero_stage stage_zero zero_optimization",
    "remat": "ac activation_checkpointing checkpointing gradient_checkpointing recompute",
    "pipeline": "schedule pipeline_schedule pp_schedule",
}
_OURS = {name: ours for ours, names in ELSEWHERE.items() for name in names.split()}


def our_name(name: str, legal: Mapping[str, Any]) -> str | None:
    """The setting that a name which is none may mean: by what it is called elsewhere, else by its spelling."""
    plain = name.lower().replace("-", "_")
    found = plain if plain in legal else _OURS.get(plain)
    if found is None:
        found = next(iter(difflib.get_close_matches(plain, legal, n=1)), None)
    return found if found in legal else None


def read(
    text: str, defaults: Mapping[str, Any], parsers: Mapping[str, Callable[[str], Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The settings of a text, and what is wrong with it.

    Args:
        text: settings separated by commas, each `name=value`, or a name alone.
        defaults: every legal setting with its default, whose type decides what is read.
        parsers: what reads a setting that is neither a flag nor an integer nor a word.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in defaults:
            meant = our_name(name, defaults)
            hint = f"did you mean {meant!r}? " if meant else ""
            problems.append(f"unknown setting {name!r}: {hint}legal are {', '.join(defaults)}")
        elif name in settings:
            problems.append(f"{name} is given twice")
        elif isinstance(defaults[name], bool):
            settings[name] = value.lower() == "true" or not equals
            if equals and value.lower() not in ("true", "false"):
                problems.append(f"{item!r}: {name} is a flag, bare or with =true or =false")
        elif isinstance(defaults[name], int):
            try:
                settings[name] = int(value)
            except ValueError:
                problems.append(f"{item!r}: {name} takes an integer, as in {name}=2")
        elif name in parsers:
            settings[name] = parsers[name](value)
        else:
            settings[name] = value
    return settings, problems
