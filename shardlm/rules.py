"""Which mesh axes split the parameters of any module: ordered rules over their paths, its annotations, and ZeRO.

A rule is a regular expression and a `PartitionSpec` that names mesh axes. For each parameter the first rule found in
its path (`re.search`) decides, whatever the module says; without one, the annotation that the module carries. What
they leave is ZeRO's: the largest dim that divides by `fsdp` and has no axis yet. Axes of one device are left out, so
the same rules serve every layout. A rule that does nothing is an error: nothing is replicated in silence.
"""

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from shardlm._errors import raise_all
from shardlm._rules_table import as_html, as_text, literal, suggestions
from shardlm.dims import Split
from shardlm.layout import Axis, Layout, LayoutError

LARGE = 10**6
"""Bytes on a device from which a parameter that is held more than once is worth a warning."""

Entries = tuple[tuple[str, ...], ...]
"""The axes of each dim that a spec names."""

_USABLE = (Axis.FSDP, Axis.TENSOR)


class ReplicatedParameterWarning(UserWarning):
    """A large parameter is held whole by devices that could share it."""


@dataclass(frozen=True, repr=False)
class ParameterTable:
    """How each parameter is split, and what decided it; `print` shows it.

    Attributes:
        layout: with its sizes filled in.
        splits: by path.
        dtypes: by path.
        reasons: by path, what decided: a rule, the annotation, ZeRO.
    """

    layout: Layout
    splits: dict[str, Split]
    dtypes: dict[str, Any]
    reasons: dict[str, str]

    def bytes_per_device(self, path: str) -> int:
        """What a device stores of the parameter between steps."""
        split = self.splits[path]
        return math.prod(split.shape) * self.dtypes[path].itemsize // _parts(self.layout, split.stored)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self)


@dataclass(frozen=True)
class _Rule:
    name: str
    pattern: re.Pattern[str]
    entries: Entries


def match_rules(
    shapes: Any,
    rules: Sequence[tuple[str, PartitionSpec]] | None,
    layout: Layout | str,
    annotations: Mapping[str, PartitionSpec] | None = None,
    others: Iterable[str] = (),
) -> ParameterTable:
    """The table of specs of parameters that need not exist yet.

    Args:
        shapes: a pytree of `jax.ShapeDtypeStruct`s or arrays, or an `nnx.State` of parameters, as of
            `nnx.state(nnx.eval_shape(make), nnx.Param)`, whose annotations are then read too.
        rules: (regular expression, spec) pairs, the first that is found in a path decides. None: annotations and ZeRO
            decide; else every parameter needs a rule or an annotation.
        layout: its sizes filled in; a `Layout` or its text.
        annotations: specs that a module carries, by path. A rule overrides them; the table's reasons say so.
        others: paths of annotated arrays that are no parameters, which rules may be for as well; see `split_annotated`.

    Raises:
        LayoutError: one error that lists every conflict: a parameter without a rule; a rule that matches nothing, or
            nothing that rules before it left; an unknown axis in a rule, or in an annotation that no rule overrides; an
            axis used twice; more entries than dims; dims that do not divide; an axis that splits nothing.

    Warns:
        ReplicatedParameterWarning: a parameter of a megabyte or more is held whole by several devices.

    Example:
        >>> shapes = {"mlp": {"kernel": jax.ShapeDtypeStruct((16, 64), "float32")}}
        >>> match_rules(shapes, [("kernel$", P(None, "tensor"))], Layout(fsdp=2, tensor=4)).splits["mlp/kernel"].stored
        PartitionSpec('fsdp', 'tensor')
    """
    layout = Layout.of(layout)
    assert layout.num_devices  # an error while a size is -1
    leaves, read = flatten_parameters(shapes)
    annotated = {path: _entries(spec) for path, spec in (read | dict(annotations or {})).items()}
    if not leaves:
        raise LayoutError("there are no parameters to split: only nnx.Param are trained, and this module has none")
    parsed = _parse(rules)
    problems = [problem for rule in parsed for problem in _axis_problems(rule.name, rule.entries)]
    deciding = {path: spec for path, spec in annotated.items() if path in leaves and _first(parsed, path) is None}
    problems += _annotation_problems(deciding, leaves, layout)
    sound = not problems

    splits, reasons, unmatched = {}, {}, {}
    matched: list[list[str]] = [[] for _ in parsed]
    decided: list[list[str]] = [[] for _ in parsed]
    for path, leaf in leaves.items():
        found = [index for index, rule in enumerate(parsed) if rule.pattern.search(path)]
        for index in found:
            matched[index].append(path)
        annotation = annotated.get(path)
        entries: Entries = ()
        reason = ""
        if found:
            rule = parsed[found[0]]
            decided[found[0]].append(path)
            entries, reason = rule.entries, rule.name
            if annotation is not None and annotation != entries:
                reason += f", over the annotation {literal(annotation)}"
        elif annotation is not None:
            entries, reason = annotation, "annotation"
        elif rules is not None:
            unmatched[path] = leaf
        if sound:
            problems += _shape_problems(f"{path} {leaf.shape}: {reason}", entries, leaf.shape, layout)
            splits[path] = _split(path, leaf.shape, entries, layout)
            reasons[path] = _reason(reason, splits[path], layout)

    for path in others:
        for index in (found := [i for i, rule in enumerate(parsed) if rule.pattern.search(path)]):
            matched[index].append(path)
        for index in found[:1]:
            decided[index].append(path)
    problems += _rule_problems(parsed, matched, decided, list(leaves))
    if unmatched:
        problems.append(suggestions(unmatched, layout, catch_all=not annotated))
    raise_all("the parameters cannot be split as asked", problems or _idle_axes(splits, leaves, layout))
    table = ParameterTable(layout, splits, {path: jnp.dtype(leaf.dtype) for path, leaf in leaves.items()}, reasons)
    _warn_of_copies(table)
    return table


def split_annotated(
    path: str,
    shape: tuple[int, ...],
    spec: PartitionSpec | None,
    layout: Layout,
    rules: Sequence[tuple[str, PartitionSpec]] | None = None,
) -> Split:
    """How an array that is no parameter is split: as its annotation says, or the first rule for it; else whole.

    Rules are for annotated arrays alone, and ZeRO leaves all of them as they are.

    Raises:
        LayoutError: what decides does not fit the mesh or the shape.
    """
    entries = () if spec is None else _entries(spec)
    parsed = _parse(rules) if entries else []
    index = _first(parsed, path) if entries else None
    if index is not None:
        where, entries = f"{path} {shape}: {parsed[index].name}", parsed[index].entries
    else:
        where = f"{path} {shape}: the annotation {literal(entries)}"
    problems = _axis_problems(where, entries)
    if problems and index is None:
        problems[-1] += f', or give a rule for it, which overrides the annotation: (r"^{re.escape(path)}$", P())'
    raise_all("a variable cannot be split as annotated", problems or _shape_problems(where, entries, shape, layout))
    return Split(path, shape, (None,) * len(shape), _live(entries, len(shape), layout), (), None, False)


def flatten_parameters(shapes: Any) -> tuple[dict[str, Any], dict[str, PartitionSpec]]:
    """Leaves by path, "blocks/0/kernel", and the annotations of those that are variables of Flax."""
    if not isinstance(shapes, nnx.State):
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}, {}
    leaves, annotations = {}, {}
    for keys, variable in nnx.to_flat_state(shapes):
        path = "/".join(map(str, keys))
        leaves[path] = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        spec = annotation_of(variable)
        if spec is not None:
            annotations[path] = spec
    return leaves, annotations


def annotation_of(variable: Any) -> PartitionSpec | None:
    """The spec that a variable of Flax carries (`out_sharding`, through its `sharding_rules`); None without one."""
    if not isinstance(variable, nnx.Variable) or variable.get_metadata().get("out_sharding") is None:
        return None
    return nnx.spmd.get_var_pspec(variable)


def _parse(rules: Any) -> list[_Rule]:
    problems, parsed = [], []
    if isinstance(rules, str | Mapping):
        raise LayoutError(f"rules: a {type(rules).__name__}; it is a list of (regular expression, PartitionSpec) pairs")
    for index, rule in enumerate(rules or ()):
        if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
            problems.append(f"rule {index} is {rule!r}; it is a pair (regular expression, PartitionSpec)")
            continue
        if not isinstance(rule[1], PartitionSpec):
            problems.append(f"rule {index} ({rule[0]!r}): {rule[1]!r} is no PartitionSpec, as P(None, 'tensor') is one")
            continue
        try:
            pattern = re.compile(rule[0])
        except re.error as error:
            problems.append(f"rule {index}: {rule[0]!r} is no regular expression: {error}")
            continue
        entries = _entries(rule[1])
        parsed.append(_Rule(f"rule {index} ({rule[0]!r}, {literal(entries)})", pattern, entries))
    raise_all("the rules cannot be read", problems)
    return parsed


def _entries(spec: Iterable[Any]) -> Entries:
    entries = [
        () if entry is None else tuple(map(str, entry)) if isinstance(entry, tuple | list) else (str(entry),)
        for entry in spec
    ]
    while entries and not entries[-1]:
        entries.pop()
    return tuple(entries)


def _first(rules: list[_Rule], path: str) -> int | None:
    """The number of the rule that decides; None where none is found in the path."""
    return next((index for index, rule in enumerate(rules) if rule.pattern.search(path)), None)


def _annotation_problems(annotated: Mapping[str, Entries], leaves: Mapping[str, Any], layout: Layout) -> list[str]:
    """What is wrong with the annotations that decide: a line for each kind, and one for all logical names together."""
    problems: list[str] = []
    logical: dict[str, Entries] = {}
    for spec in dict.fromkeys(annotated.values()):
        paths = [path for path, other in annotated.items() if other == spec]
        names = {axis for axes in spec for axis in axes}.difference(Axis)
        if names and not any(difflib.get_close_matches(name, list(Axis), n=1) for name in names):
            logical |= dict.fromkeys(paths, spec)
        else:
            problems += _axis_problems(f"the annotation {literal(spec)} of {_some(paths)}", spec)
    if logical:
        first = next(iter(logical))
        written = dict.fromkeys(name for spec in logical.values() for axes in spec for name in axes)
        names = [name for name in written if name not in tuple(Axis)]
        others = f" (nor are {', '.join(map(repr, names[1:6]))}{', ...' * (len(names) > 6)})" if names[1:] else ""
        rule = suggestions({first: leaves[first]}, layout, catch_all=False, rule=True)
        count = f" and {len(logical) - 1} more parameters" if len(logical) > 1 else ""
        problems.append(
            f"the annotation {literal(logical[first])} of {first}{count}: {names[0]!r} is no mesh axis{others}. Give "
            f'rules, which override annotations, as in rules=[{rule}, (r".*", P())]; a parameter can be split over '
            f"{', '.join(repr(str(axis)) for axis in _USABLE)}"
        )
    return problems


def _axis_problems(where: str, entries: Entries) -> list[str]:
    used = [axis for axes in entries for axis in axes]
    problems = []
    for axis in dict.fromkeys(used):
        if axis == Axis.DATA:
            problems.append(f"{where}: data splits the batch and nothing else: to split a parameter too, use fsdp")
        elif axis not in tuple(Axis):
            near = difflib.get_close_matches(axis, list(Axis), n=1)
            hint = f"did you mean {str(near[0])!r}? " if near else ""
            legal = ", ".join(repr(str(a)) for a in _USABLE)
            problems.append(f"{where}: {axis!r} is no mesh axis: {hint}a parameter can be split over {legal}")
        if used.count(axis) > 1:
            problems.append(f"{where}: the axis {axis!r} is used {used.count(axis)} times; once is the most")
    return problems


def _shape_problems(where: str, entries: Entries, shape: tuple[int, ...], layout: Layout) -> list[str]:
    if len(entries) > len(shape):
        return [f"{where} has {len(entries)} entries, for {len(shape)} dims"]
    problems = []
    for dim, axes in enumerate(_live(entries, len(shape), layout)):
        count = _count(layout, axes)
        if shape[dim] % count:
            product = " x ".join(f"{axis}={getattr(layout, axis)}" for axis in axes)
            legal = [n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0][:6]
            problems.append(
                f"{where}: dim {dim} of size {shape[dim]} does not divide over {product}; "
                f"it divides by {', '.join(map(str, legal))}"
            )
    return problems


def _rule_problems(
    rules: list[_Rule], matched: list[list[str]], decided: list[list[str]], paths: list[str]
) -> list[str]:
    problems = []
    for index, rule in enumerate(rules):
        if not matched[index]:
            near = difflib.get_close_matches(rule.pattern.pattern, paths, n=1, cutoff=0.0)
            problems.append(f"{rule.name} matches no parameter; paths are like {near[0]!r}: correct it or delete it")
        elif not decided[index]:
            before = [i for i in range(index) if set(decided[i]) & set(matched[index])]
            problems.append(
                f"{rule.name} decides nothing: all that it matches, {_some(matched[index])}, is taken by "
                f"rule{'s' * (len(before) > 1)} {', '.join(map(str, before))} before it: move it up or delete it"
            )
    return problems


def _idle_axes(splits: Mapping[str, Split], leaves: Mapping[str, Any], layout: Layout) -> list[str]:
    used = {axis for split in splits.values() for axes in _entries(split.sharded) for axis in axes}
    problems = []
    largest = max(leaves, key=lambda path: math.prod(leaves[path].shape))
    if layout.tensor > 1 and Axis.TENSOR not in used:
        problems.append(
            f"tensor={layout.tensor} splits nothing: no rule and no annotation names 'tensor'. Use tensor=1, or add a "
            f'rule for what it is to split, as in rules=[(r"^{re.escape(largest)}$", P(None, "tensor")), (r".*", P())]'
        )
    if layout.fsdp > 1 and Axis.FSDP not in used:
        problems.append(
            f"fsdp={layout.fsdp} splits nothing: no parameter has a free dim that divides by {layout.fsdp}, not even "
            f"the largest, {largest} {leaves[largest].shape}: use data={layout.data * layout.fsdp} and fsdp=1"
        )
    return problems


def _split(path: str, shape: tuple[int, ...], entries: Entries, layout: Layout) -> Split:
    model = _live(entries, len(shape), layout)
    free = layout.fsdp > 1 and all(Axis.FSDP not in axes for axes in model)
    fits = [d for d, n in enumerate(shape) if not model[d] and n and n % layout.fsdp == 0] if free else []
    dim = max(fits, key=lambda d: shape[d], default=None)
    zero_axes = () if dim is None else (str(Axis.FSDP),)
    return Split(path, tuple(shape), (None,) * len(shape), model, zero_axes, dim, layout.zero == 3)


def _live(entries: Entries, ndim: int, layout: Layout) -> Entries:
    """The axes of more than one device, for each of `ndim` dims."""
    live = [tuple(axis for axis in axes if getattr(layout, axis) > 1) for axes in entries[:ndim]]
    return tuple(live) + ((),) * (ndim - len(live))


def _reason(origin: str, split: Split, layout: Layout) -> str:
    zero = f"ZeRO-{layout.zero} on dim {split.zero_dim}" if split.zero_dim is not None else ""
    return ", ".join(filter(None, (origin, zero))) or "whole"


def _warn_of_copies(table: ParameterTable) -> None:
    lines = []
    for path, split in table.splits.items():
        used = {axis for axes in _entries(split.sharded) for axis in axes}
        idle = [str(a) for a in _USABLE if a not in used and getattr(table.layout, a) > 1]
        size = math.prod(split.shape) * table.dtypes[path].itemsize // _parts(table.layout, split.sharded)
        if idle and size >= LARGE:
            copies = " x ".join(f"{axis}={getattr(table.layout, axis)}" for axis in idle)
            count = _count(table.layout, idle)
            leaf = jax.ShapeDtypeStruct(split.shape, table.dtypes[path])
            lines.append(
                f"{path} {split.shape} {table.dtypes[path]}: {size:,} bytes on each device, the same on the {count} of "
                f"{copies}, {size - size // count:,} more than a share of it; "
                + suggestions({path: leaf}, table.layout, catch_all=False, brief=True)
            )
    if lines:
        warnings.warn(
            "large parameters are replicated:\n  " + "\n  ".join(lines), ReplicatedParameterWarning, stacklevel=2
        )


def _parts(layout: Layout, spec: PartitionSpec) -> int:
    return _count(layout, [axis for axes in _entries(spec) for axis in axes])


def _count(layout: Layout, axes: Iterable[str]) -> int:
    return math.prod(getattr(layout, axis) for axis in axes)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
