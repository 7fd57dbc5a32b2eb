"""A family of models: how its config.json and its tensors' names are those of a `TransformerConfig` and parameters."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardlm.hub.fields import Field, Fields, read_fields
from shardlm.hub.kinds import TEXTS
from shardlm.hub.table import Row
from shardlm.models.config import MLP, Attention, Norm, Rope, TransformerConfig

_PARTS = {"attention": Attention, "mlp": MLP, "norm": Norm}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, as transformers has it.

    Attributes:
        model_type: in config.json.
        architectures: that may be named in config.json, the language model first; the others are it without a head.
        fields: what config.json and `TransformerConfig` both say.
        fixed: what the family always has, by dotted name in `TransformerConfig`.
        must: fields of config.json that may have these values alone, the first of which is written.
        positions: the type of the positions.
        read: more of `TransformerConfig`, by dotted name, from the file's fields and what was read so far.
        write: more of config.json.
        rows: a row for each parameter, and for parameters that only some of the models have.
        prefix: of the tensors' names; files of the model without its head lack it.
        buffers: regular expressions of tensors in files that are no parameters, but constants that follow from
            config.json.
        even_width: whether transformers refuses a `d_model` that does not divide by `num_heads`.
    """

    model_type: str
    architectures: tuple[str, ...]
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    must: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    positions: type = Rope
    read: Callable[[Fields, dict[str, Any]], dict[str, Any]] = lambda fields, ours: {}
    write: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    prefix: str = "model."
    buffers: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    even_width: bool = False

    def config(self, values: Mapping[str, Any], where: str, ignore: Collection[str] = ()) -> TransformerConfig:
        """The configuration that a config.json describes, computing and stored in float32.

        Args:
            values: of the file.
            where: what errors call it.
            ignore: fields to be left out, as if the file did not have them.

        Raises:
            ValueError: it describes something that a `TransformerConfig` cannot, or says something unknown.
        """
        fields = Fields(values, where, ignore=ignore)
        stated = fields.take("architectures", [], TEXTS, null=True) or []
        if not set(stated) <= set(self.architectures):
            fields.refuse("architectures", f"a {self.model_type} here is one of {', '.join(self.architectures)}")
        ours = dict(self.fixed) | read_fields(self.fields, fields)
        for name, legal in self.must.items():
            if fields.take(name, legal[0]) not in legal:
                fields.refuse(name, f"a {self.model_type} here has {' or '.join(map(repr, legal))}")
        ours |= self.read(fields, ours)
        fields.finish()
        try:
            return _build(ours)
        except ValueError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error

    def values(self, config: TransformerConfig) -> dict[str, Any]:
        """The config.json of a configuration, which is right where `config(values)` gives that back."""
        values = {f.name: f.write(_get(config, f.all_ours[0])) for f in self.fields}
        values |= {name: legal[0] for name, legal in self.must.items()}
        return {"architectures": [self.architectures[0]], "model_type": self.model_type} | values | self.write(config)

    def differences(self, config: TransformerConfig) -> list[str]:
        """What this family cannot say of a configuration; empty where it says all."""
        if self.even_width and config.d_model % config.num_heads:
            return [f"d_model={config.d_model} does not divide by num_heads={config.num_heads}"]
        if not isinstance(config.positions, self.positions):
            return [f"positions are {type(config.positions).__name__}, and {self.positions.__name__} there"]
        asked = canonical(config)
        try:
            found = canonical(self.config(self.values(asked), self.model_type))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            return [f"it cannot be written ({str(error).splitlines()[-1].strip(' -')})"]
        ours, theirs = _flat(asked.to_dict()), _flat(found.to_dict())
        return [
            f"{name}={ours.get(name)!r}, which is {theirs.get(name)!r} there"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]


def canonical(config: TransformerConfig) -> TransformerConfig:
    """The configuration with what changes no parameter's meaning at one value, and defaults written out."""
    attention = dataclasses.replace(
        config.attention,
        scale=config.head_dim**-0.5 if config.attention.scale is None else config.attention.scale,
        windows=config.windows,
        implementation="xla",
    )
    same = {"dropout": 0.0, "dtype": "float32", "param_dtype": "float32", "vocab_multiple": 1, "origin": None}
    if config.local_positions == config.positions or set(config.windows) == {None}:
        same["local_positions"] = None
    return dataclasses.replace(config, attention=attention, **same)


def _build(ours: Mapping[str, Any]) -> TransformerConfig:
    """A configuration from its values by dotted name."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in _PARTS}
    values: dict[str, Any] = {}
    for name, value in ours.items():
        part, _, inner = name.partition(".")
        if inner:
            parts[part][inner] = value
        else:
            values[name] = value
    return TransformerConfig(**values, **{name: _PARTS[name](**inner) for name, inner in parts.items()})


def _get(config: TransformerConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
