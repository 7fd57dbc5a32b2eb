"""The tensors that a folder must hold for a model, against those that it holds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from shardlm.hub.family import Family
from shardlm.hub.fields import raise_problems
from shardlm.hub.files import Tensors
from shardlm.hub.table import Placed, Tensor, place, tensors
from shardlm.models.config import TransformerConfig
from shardlm.models.transformer import parameter_dims
from shardlm.runtime.strangers import printable
from shardlm.train.engine import flatten

_SHOWN = 12  # problems in one message
HEAD = "lm_head.weight"  # in every family, where the head has a table of its own
_PIECE = 1 << 24  # elements compared at a time


@dataclass(frozen=True)
class Names:
    """A model's tensors, found.

    Attributes:
        placed: for each parameter by path, its place in a tensor.
        tensors: all that the model has.
        found: their names in the files by their names in the family's table; files of a model without its head have
            no prefix.
    """

    placed: dict[str, Placed]
    tensors: list[Tensor]
    found: dict[str, str]


def expected(config: TransformerConfig, family: Family) -> tuple[dict[str, Placed], list[Tensor]]:
    """For each parameter by path its place in a tensor, and all tensors of the model."""
    _, _, dims = parameter_dims(config)
    parameters: Mapping[str, tuple[Any, Any]] = flatten(dims)
    placed = place(family.rows, parameters, config.vocab_size)
    return placed, tensors(placed, config.num_layers)


def match(config: TransformerConfig, family: Family, files: Tensors, where: str) -> Names:
    """Find the model's tensors among those of the files.

    Raises:
        ValueError: one is missing, has another shape, or is there and belongs to no parameter; all are listed.
    """
    check_sizes(config, family, files, where)
    placed, wanted = expected(config, family)
    bare = not any(name.startswith(family.prefix) for name in files.shapes)
    found = {tensor.name: tensor.name.removeprefix(family.prefix) if bare else tensor.name for tensor in wanted}
    problems = []
    embedding = placed["embedding/table"].row.name
    if config.tied and found[embedding] not in files.shapes and HEAD in files.shapes:
        found[embedding] = HEAD  # one table, which some programs store under this name
    for tensor in wanted:
        name = found[tensor.name]
        if name not in files.shapes:
            problems.append(f"{name} is missing, of shape {list(tensor.shape)}")
        elif files.shapes[name] != tensor.shape:
            problems.append(f"{name} has the shape {list(files.shapes[name])}; config.json says {list(tensor.shape)}")
    table = found[embedding]
    for name in sorted(set(files.shapes) - set(found.values())):
        if any(re.search(pattern, name) for pattern in family.buffers):
            continue
        if name == HEAD and config.tied and table in files.shapes:
            if not _equal(files, name, table):
                problems.append(f"{name} is not {table}, though config.json says tie_word_embeddings")
            continue
        problems.append(
            f"{printable(name)}, of shape {list(files.shapes[name])}, belongs to no parameter of this model"
        )
    more = len(problems) - _SHOWN
    shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    raise_problems(f"the tensors of {where} are not those of the {family.model_type} that its config.json says", shown)
    return Names(placed, wanted, found)


def check_sizes(config: TransformerConfig, family: Family, files: Tensors, where: str) -> None:
    """Raise ValueError if config.json says a model that is far larger than what the files hold.

    It takes no more time or memory than the files' own lists of tensors, whatever numbers are in config.json.
    """
    sizes = {"vocab": config.vocab_size, "embed": config.d_model, "mlp": config.d_ff, "head_dim": config.head_dim}
    sizes |= {"head": config.num_heads, "kv_head": config.num_kv_heads}
    rows = [row for row in family.rows if row.path.endswith("/kernel") or row.path == "embedding/table"]
    needed, problems = 0, []
    for row in rows:
        shape = [prod(sizes[dim] for dim in group) for group in row.groups]
        needed += prod(shape) * (config.num_layers if row.stacked else 1)
        name = row.name.format(layer=0)
        stored = files.shapes.get(name, files.shapes.get(name.removeprefix(family.prefix)))
        shape[-1] *= row.part[1]
        if stored is not None and list(stored) != shape:
            problems.append(f"{name} has the shape {list(stored)}; config.json says {shape}")
    if needed <= 2 * sum(map(prod, files.shapes.values())):
        return  # what differs is listed tensor by tensor
    numbers = [
        int(found[1]) for name in files.shapes if (found := re.search(r"(?:^|\.)(?:h|layers)\.(\d{1,9})\.", name))
    ]
    held = 1 + max(numbers, default=-1)
    if held != config.num_layers:
        problems.insert(0, f"there are tensors of {held:,} layers; config.json says {config.num_layers:,}")
    count = sum(map(prod, files.shapes.values()))
    said = f"config.json says a {family.model_type} of {needed:,} parameters or more"
    title = f"{where}: {said}, and the files hold {count:,}"
    raise_problems(title, problems[:_SHOWN] or ["the tensors of most of it are missing"])


def one_dtype(files: Tensors, names: Names, where: str) -> np.dtype:
    """The dtype of the model's tensors.

    Raises:
        ValueError: they have several.
    """
    counts: dict[np.dtype, int] = {}
    for name in names.found.values():
        counts[files.dtypes[name]] = counts.get(files.dtypes[name], 0) + 1
    if len(counts) > 1:
        told = ", ".join(f"{count} of {dtype}" for dtype, count in counts.items())
        raise ValueError(f"the tensors of {where} have several dtypes ({told}): say with dtype which to store them in")
    return next(iter(counts))


def _equal(files: Tensors, a: str, b: str) -> bool:
    if files.shapes[a] != files.shapes[b] or files.dtypes[a] != files.dtypes[b]:
        return False
    rows, width = files.shapes[a]
    step = max(1, _PIECE // width)
    pieces = [(slice(start, min(start + step, rows)), slice(0, width)) for start in range(0, rows, step)]
    return all(np.array_equal(files.reader(a)(piece), files.reader(b)(piece)) for piece in pieces)
