"""The fields of a config.json: each is read once, and one that nobody read is an error unless known to be harmless."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shardlm.hub.harmless import HARMLESS, NOTHING_AT, is_nothing
from shardlm.hub.kinds import ANY, Kind
from shardlm.runtime.strangers import printable

REQUIRED = object()  # the default of a field that must be there

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


class Fields:
    """The fields of one config.json, or of another such file, of which every one is to be read.

    Args:
        values: what the file holds.
        where: what errors call it.
        harmless: names of fields that change nothing.
        nothing_at: fields that change nothing at these values, and what they mean at others.
        what: what of ours has no such thing, in errors.
        ignore: names of fields that are left out, as if the file did not have them.
        harmless: names of fields that change nothing.
        nothing_at: fields that change nothing at these values, and what they mean at others.
        what: what of ours has no such thing, in errors.

    Attributes:
        values: without those.
        problems: what was found wrong so far; `finish` raises it all at once.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        ignore: Collection[str] = (),
        *,
        harmless: Collection[str] = HARMLESS,
        nothing_at: Mapping[str, tuple[Any, str]] = NOTHING_AT,
        what: str = "shardlm's Transformer has",
    ):
        self.values, self.where = {name: value for name, value in values.items() if name not in ignore}, where
        self._harmless, self._nothing_at, self._what = harmless, nothing_at, what
        self.problems: list[str] = []
        self._read: set[str] = set()
        if absent := sorted(map(str, set(ignore) - set(values))):
            self.problems.append(f"ignore_fields names {', '.join(absent)}, which the file does not have")

    def take(self, name: str, default: Any = REQUIRED, kind: Kind = ANY, *, null: bool = False) -> Any:
        """The value of a field, which must be of a kind.

        Args:
            name: of the field.
            default: where the file does not have it; without one it must be there.
            kind: of its value.
            null: whether it may be null, which then is None.

        Returns:
            The value; the default, or None without one, where a problem was noted.
        """
        self._read.add(name)
        fallback = None if default is REQUIRED else default
        if name not in self.values:
            if default is REQUIRED:
                self.problems.append(f"{name} is missing")
            return fallback
        value = self.values[name]
        if (value is None and null) or kind.fits(value):
            return value
        self.refuse(name, f"{kind.said}{', or null' * null}")
        return fallback

    def refuse(self, name: str, what: str) -> None:
        """Note a problem with a field, whose value the message shows."""
        self.problems.append(f"{printable(name)}={printable(repr(self.values.get(name)))}: {what}")

    def finish(self) -> None:
        """Raise ValueError for all that was found wrong, and for every field that nobody read."""
        for name, (legal, meaning) in self._nothing_at.items():
            if name in self.values and name not in self._read and not is_nothing(self.values[name], legal):
                may_be = "" if callable(legal) else f"; it may be {_listed(legal)}"
                self.refuse(name, f"{meaning}, which {self._what} not{may_be}")
        unread = set(self.values) - self._read - set(self._harmless) - set(self._nothing_at)
        unknown = sorted(name for name in unread if self.values[name] is not None)  # null says nothing
        for name in unknown:
            self.refuse(name, "shardlm does not know this field, which may change what the model computes")
        ignore = f"ignore_fields=[{', '.join(printable(repr(name)) for name in unknown)}]"
        advice = f"\n  If the unknown fields change nothing: {ignore}, --ignore-fields on the command line"
        raise_problems(f"{self.where} cannot be read", self.problems, advice if unknown else "")


@dataclass(frozen=True)
class Field:
    """A field of config.json that is one of ours, or several alike.

    Attributes:
        name: in config.json.
        ours: in `TransformerConfig`, with dots into its parts: "norm.epsilon". Several: all of them have the value.
        kind: of its value.
        default: what transformers takes where the field is absent; None also stands for null.
        read, write: from the file's value to ours, and back.
        null: whether it may be null, whatever the default.
        alias: another name that transformers takes for it.
    """

    name: str
    ours: str | tuple[str, ...]
    kind: Kind
    default: Any = REQUIRED
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    null: bool = False
    alias: str | None = None

    @property
    def all_ours(self) -> tuple[str, ...]:
        """The names in `TransformerConfig`."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def activation(name: str, default: str, tanh: str = "gelu_pytorch_tanh") -> Field:
    """A field that names the activation of the feed-forward branch; `tanh` is what GELU's approximation is written."""
    back = {"silu": "silu", "gelu": "gelu", "relu": "relu", "gelu_tanh": tanh}
    said = f"not a value that shardlm knows; legal are {', '.join(ACTIVATIONS)}"
    known = Kind(said, lambda value: isinstance(value, str) and value in ACTIVATIONS)
    return Field(name, "mlp.activation", known, default, ACTIVATIONS.__getitem__, back.__getitem__)


def read_fields(table: tuple[Field, ...], fields: Fields) -> dict[str, Any]:
    """Our values by dotted name, of the fields in the table; what is wrong is noted."""
    ours: dict[str, Any] = {}
    for field in table:
        null, default = field.null or field.default is None, field.default
        if field.alias is not None and field.alias in fields.values:
            default = fields.take(field.alias, field.default, field.kind, null=null)
        value = fields.take(field.name, default, field.kind, null=null)
        if field.alias is not None and field.alias in fields.values and value != default:
            fields.refuse(field.alias, f"{field.name}={value!r} says something else")
        ours |= dict.fromkeys(field.all_ours, None if value is None else field.read(value))
    return ours


def raise_problems(title: str, problems: list[str], advice: str = "") -> None:
    """Raise one ValueError that lists the problems, if there are any, and what to do."""
    if problems:
        raise ValueError(f"{title}:" + "".join(f"\n  - {problem}" for problem in problems) + advice)


def _listed(legal: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, legal)) + " (or absent)"
