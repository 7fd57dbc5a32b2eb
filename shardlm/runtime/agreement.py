"""Whether all processes are about to run the same program: if not, they would wait for one another for ever."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PROGRAM = "program"  # the name of what `words` gives
_SHOWN = 200  # characters of a value in a message


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Return when every process has given the same facts; all of them call this at the same point.

    Args:
        what: they are about to do, for the message.
        facts: values by name, which JSON can hold.

    Raises:
        ValueError: on every process, naming which differ from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    _same_devices()
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return
    problems = differences([json.loads(other) for other in _gather(text)])
    raise ValueError(f"{what}: the processes do not do the same:\n  - " + "\n  - ".join(problems))


def differences(facts: list[dict[str, Any]]) -> list[str]:
    """In which facts which processes differ from process 0."""
    problems = []
    for index, theirs in enumerate(facts[1:], 1):
        names = [name for name in dict.fromkeys([*facts[0], *theirs]) if facts[0].get(name) != theirs.get(name)]
        # Another program follows from what else is different, and says less.
        for name in [name for name in names if name != PROGRAM] or names:
            a, b = facts[0].get(name), theirs.get(name)
            problems.append(f"{name}: {_short(b, a)} on process {index}, {_short(a, b)} on process 0")
    return problems


def words(program: Any) -> dict[str, int]:
    """How often each word is in a traced program: equal for equal programs, whatever order sets are printed in."""
    text = re.sub(r"0x[0-9a-f]+", "", str(program))
    return dict(sorted(Counter(re.findall(r"[\w.+-]+", text)).items()))


def _short(value: Any, other: Any) -> str:
    if isinstance(value, dict) and isinstance(other, dict):  # of a program, what is not in the other
        parts = [f"{key}: {count}" for key, count in value.items() if other.get(key) != count]
        value = "{" + ", ".join(parts[:8]) + (", ..." if len(parts) > 8 else "") + "}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _same_devices() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        held = ", ".join(f"process {index} has {count}" for index, count in sorted(counts.items()))
        raise ValueError(f"the processes of a run have equally many devices, but {held}")


def _gather(text: bytes) -> list[bytes]:
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
