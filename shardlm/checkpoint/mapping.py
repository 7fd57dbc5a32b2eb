"""Which stored array each leaf of the target is, where the two models differ and the caller says how."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Sources(NamedTuple):
    """Where each leaf of a target comes from.

    Attributes:
        stored: by path in the target, the path of the stored array.
        kept: the paths of the target whose values stay as they are.
        problems: what cannot be, a line for each.
    """

    stored: dict[str, str]
    kept: list[str]
    problems: list[str]


def sources(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    mapping: Mapping[str, str | None],
    ignore: Sequence[str],
    only: str | None,
) -> Sources:
    """Pairs leaves of the target with stored arrays.

    Args:
        stored, wanted: shapes and dtypes by path, the latter those of the target.
        mapping, ignore, only: see `restore`.
    """
    found: dict[str, str] = {}
    kept, problems = [], []
    used = set()
    for name in wanted:
        key = max((key for key in mapping if _below(name, key)), key=len, default=None)
        if key is None:
            found[name] = name
            continue
        used.add(key)
        source = mapping[key]
        if source is not None:
            found[name] = source + name[len(key) :]
        elif isinstance(wanted[name], jax.Array):
            kept.append(name)
        else:
            problems.append(f"{name}: mapped to None, to stay as it is, but the target gives no values: give a state")
    problems += [f"{key}: mapped, but the target has nothing there" for key in mapping if key not in used]
    problems += [
        f"{key}: ignored, but the checkpoint has nothing there"
        for key in ignore
        if not any(_below(name, key) for name in stored)
    ]
    left = stored.keys() - found.values()
    problems += [
        f"{name}: not expected {stored[name].dtype} {tuple(stored[name].shape)}"
        for name in left
        if (only is None or _below(name, only)) and not any(_below(name, key) for key in ignore)
    ]
    return Sources(found, kept, problems)


def rounds(pairs: Mapping[str, str]) -> list[dict[str, str]]:
    """The pairs in groups in which every stored array comes once: a group is read at a time."""
    groups: list[dict[str, str]] = []
    times: dict[str, int] = {}
    for name, source in pairs.items():
        count = times[source] = times.get(source, 0) + 1
        if count > len(groups):
            groups.append({})
        groups[count - 1][name] = source
    return groups


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")
