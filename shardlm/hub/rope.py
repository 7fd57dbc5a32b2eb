"""Rotary positions and sliding windows in a config.json, in the spellings of old and new versions of transformers.

New: `rope_parameters`, which holds `rope_theta`, `rope_type` and what scaling needs; with two kinds of layers, one such
dict for each. Old: `rope_theta`, and `rope_scaling` with the rest. Both are written, as an old version that found only
the new one would take its own default without a word.
"""

import warnings
from typing import Any

from shardlm.hub.fields import Fields
from shardlm.hub.kinds import MOST, NUMBER, OBJECT, SIZE, TEXTS
from shardlm.models.config import LinearScaling, Llama3Scaling, Rope, TransformerConfig
from shardlm.runtime.strangers import printable

FULL, SLIDING = "full_attention", "sliding_attention"  # what layer_types calls the layers
SPELLINGS = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}


def read_rope(fields: Fields, theta: float = 10_000.0) -> Rope | None:
    """The rotary positions of all layers; `theta` is the base where the file names none. None: a problem was noted."""
    new, old = (fields.take(name, None, OBJECT, null=True) for name in ("rope_parameters", "rope_scaling"))
    given = fields.take("rope_theta", None, NUMBER)
    if new and {FULL, SLIDING} & set(new):
        fields.refuse("rope_parameters", "layers of two kinds, which shardlm knows of Gemma 3 alone")
        return None
    return _agreed(fields, [("rope_parameters", new), ("rope_scaling", old)], given, theta)


def read_two_ropes(fields: Fields, theta: float, local_theta: float) -> tuple[Rope | None, Rope | None]:
    """The rotary positions of layers without a window, and with one."""
    new, old = (fields.take(name, None, OBJECT, null=True) for name in ("rope_parameters", "rope_scaling"))
    given, given_local = (fields.take(name, None, NUMBER) for name in ("rope_theta", "rope_local_base_freq"))
    new = new or {}
    if unknown := sorted(set(new) - {FULL, SLIDING}):
        named = printable(", ".join(unknown))
        fields.refuse("rope_parameters", f"{named} is no kind of layer; these are {FULL}, {SLIDING}")
        return None, None
    if any(not (new.get(kind) is None or OBJECT.fits(new[kind])) for kind in (FULL, SLIDING)):
        fields.refuse("rope_parameters", f"for each kind of layer {OBJECT.said}")
        return None, None
    if old and "type" in old and "rope_type" not in old and not new.get(FULL):
        # transformers 5 sets rope_type first, so that `type` is not looked at; transformers 4 took either.
        warnings.warn(
            f"{fields.where}: rope_scaling={printable(old)} has `type`, the old name of `rope_type`. In files of Gemma "
            "3 transformers 5 does not read it and scales nothing, and shardlm does the same. transformers 4 did "
            "scale: if the model was made for that, write rope_type into a copy of config.json",
            stacklevel=2,
        )
        old = None
    return (
        _agreed(fields, [("rope_parameters", new.get(FULL)), ("rope_scaling", old)], given, theta),
        _agreed(fields, [("rope_parameters", new.get(SLIDING))], given_local, local_theta),
    )


def rope_of(config: TransformerConfig) -> Rope:
    """The rotary positions of a configuration that is known to have them."""
    assert isinstance(config.positions, Rope)
    return config.positions


def write_rope(rope: Rope) -> dict[str, Any]:
    """Both spellings of one kind of rotary positions."""
    scaling = _scaling(rope)
    return {
        "rope_parameters": {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"}),
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
    }


def write_two_ropes(rope: Rope, local: Rope) -> dict[str, Any]:
    """Both spellings of the rotary positions of layers without a window and with one; only the new one of `local`'s
    scaling."""
    new = {FULL: write_rope(rope)["rope_parameters"], SLIDING: write_rope(local)["rope_parameters"]}
    return write_rope(rope) | {"rope_parameters": new, "rope_local_base_freq": local.theta}


def trained_length(rope: Rope) -> int | None:
    """The length of context, in tokens, that the scaling was made for; None where it does not say."""
    if not isinstance(rope.scaling, Llama3Scaling):
        return None
    length = rope.scaling.factor * rope.scaling.original_length
    return int(length) if length <= MOST else None


def read_layer_types(
    fields: Fields,
    window: int | None,
    default: tuple[str, ...],
    layers: int | None,
    switch: str = "sliding_window",
) -> tuple[int | None, ...]:
    """The pattern of windows that `layer_types` says, or else `default`, a type for each layer.

    Args:
        fields: of the file.
        window: of the layers that have one, None where the file has switched windows off.
        default: where the file has no `layer_types`.
        layers: how many there are, None where the file does not say.
        switch: the field that switched them off.
    """
    types = fields.take("layer_types", None, TEXTS, null=True)
    types = default if types is None else tuple(types)
    if unknown := sorted(set(types) - {FULL, SLIDING}):
        fields.refuse("layer_types", f"shardlm knows {FULL} and {SLIDING}, not {printable(', '.join(unknown))}")
        return (None,)
    if layers is None:  # which is a problem noted before
        return (None,)
    if len(types) != layers:
        fields.refuse("layer_types", f"{len(types)} types of {layers} layers")
        return (None,)
    if SLIDING in types and window is None:
        fields.refuse(switch, f"the layers of type {SLIDING} need it")
        return (None,)
    return shortest(tuple(window if kind == SLIDING else None for kind in types))


def shortest(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shortest pattern that, repeated, gives these windows."""
    size = next(n for n in range(1, len(windows) + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))
    return windows[:size]


def layer_types(windows: tuple[int | None, ...]) -> list[str]:
    """The types of layers with these windows."""
    return [FULL if window is None else SLIDING for window in windows]


def one_window(windows: tuple[int | None, ...]) -> int | None:
    """The window of the layers that have one, None where none has; of several, the first."""
    return next((window for window in windows if window is not None), None)


def _scaling(rope: Rope) -> dict[str, Any] | None:
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for theirs, ours in _LLAMA3.items()}
    return None


def _agreed(fields: Fields, spellings: list[tuple[str, Any]], given: float | None, theta: float) -> Rope | None:
    """What all spellings that are there say; a problem where two differ."""
    told = [(name, value) for name, value in spellings if value]
    found = [(name, _read(fields, name, dict(value), given, theta)) for name, value in told]
    ropes = [rope for _, rope in found]
    if not ropes:
        return Rope(theta=float(theta if given is None else given))
    if None in ropes:
        return None
    if any(rope != ropes[0] for rope in ropes):
        other = found[1][0]
        fields.refuse(found[0][0], f"{other}={printable(repr(fields.values[other]))} says something else")
        return None
    if given is not None and ropes[0] is not None and ropes[0].theta != given:
        fields.refuse(found[0][0], f"but rope_theta or rope_local_base_freq is {given}")
        return None
    return ropes[0]


def _read(fields: Fields, name: str, values: dict[str, Any], given: float | None, default: float) -> Rope | None:
    values = {key: value for key, value in values.items() if value is not None}
    kinds = {str(values.pop(key)) for key in ("rope_type", "type") if key in values} or {"default"}
    theta = values.pop("rope_theta", default if given is None else given)
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    kind = " and ".join(sorted(kinds))
    needed = {"default": set(), "linear": {"factor"}, "llama3": set(_LLAMA3)}.get(kind)
    if needed is None:
        fields.refuse(name, f"rope_type {printable(repr(kind))}; shardlm knows default, linear, llama3")
        return None
    if kind == "llama3" and "max_position_embeddings" in fields.values:  # as transformers does
        values.setdefault("original_max_position_embeddings", fields.values["max_position_embeddings"])
    if set(values) != needed:
        fields.refuse(
            name, f"rope_type {kind!r} has {', '.join(sorted(needed)) or 'no more values'}, and shardlm knows no "
            f"meaning of {printable(', '.join(sorted(set(values) - needed))) or 'their absence'}"
        )  # fmt: skip
        return None
    numbers = values | {"rope_theta": theta}
    length = "original_max_position_embeddings"
    wrong = [key for key, value in numbers.items() if not (SIZE if key == length else NUMBER).fits(value)]
    if wrong:
        told = ", ".join(f"{key} is {printable(repr(numbers[key]))}" for key in wrong)
        fields.refuse(name, f"{told}; each must be a positive number, {length} an integer")
        return None
    scaling = None
    if kind == "linear":
        scaling = LinearScaling(factor=float(values["factor"]))
    elif kind == "llama3":
        try:
            scaling = Llama3Scaling(**{ours: values[theirs] for theirs, ours in _LLAMA3.items()})
        except ValueError as error:
            fields.refuse(name, str(error))
            return None
    return Rope(theta=float(theta), scaling=scaling)
