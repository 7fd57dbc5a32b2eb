"""Whether all processes are about to run the same program: if not, they would wait for one another for ever.

They ask one another through the key-value store of JAX's coordination service, and not by a collective: who comes to a
collective alone waits in it without an end, or, on CPUs, has 30 s to be joined.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp

from shardlm.runtime import clusters

PROGRAM = "program"  # the name of what `words` gives
PATIENCE = "SHARDLM_PATIENCE"
FIRST, AGAIN = 3600.0, 300.0  # seconds to wait for the others: before a first program, and in the middle of a run
_NOTICE = 10.0  # seconds after which a process says whom it waits for, and again each time twice as long has passed
_SLICE = 2.0  # seconds in one call of the store, which Ctrl-C cannot end
_SHOWN = 200  # characters of a value in a message
_rounds = itertools.count()  # the same number on all processes, as all of them agree on the same things in one order


def agree(what: str, facts: Mapping[str, Any], *, detail: str = "", limit: float = FIRST) -> None:
    """Return when every process has given the same facts; all of them call this at the same point.

    Args:
        what: they are about to do, for the message.
        facts: values by name, which JSON can hold.
        detail: more about it, for those who wait.
        limit: seconds to wait for the others; `SHARDLM_PATIENCE` overrules it.

    Raises:
        ValueError: on every process, naming which differ from process 0, and in what; or on those that came, naming
            who did not.
    """
    if jax.process_count() == 1:
        return
    _same_devices()
    store = ocp.multihost.get_jax_distributed_client()
    limit = float(clusters.integer(os.environ, PATIENCE, 0)) or limit
    Round(store, jax.process_index(), jax.process_count(), next(_rounds), what, detail, limit).agree(facts)


@dataclass
class Round:
    """One agreement, as one of its processes sees it.

    All give a digest of their facts. Process 0 compares them and answers; only where they differ are facts sent.

    Attributes:
        store: JAX's client of the coordination service, or what has its methods `key_value_set`,
            `blocking_key_value_get` and `key_value_dir_get`.
        index, count: which process this is, of how many.
        number: of the agreement.
        what, detail, limit: see `agree`.
    """

    store: Any
    index: int
    count: int
    number: int
    what: str
    detail: str = ""
    limit: float = FIRST

    def agree(self, facts: Mapping[str, Any]) -> None:
        """See `agree`."""
        self._began = time.monotonic()
        self._notice = _NOTICE
        text = json.dumps(facts, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._set(f"digest/{self.index}", digest)
        if self.index == 0:
            problem = self._compare(text, digest)
            self._set("answer", problem)
        else:
            asked = self._answer("asked")
            if asked not in ("", digest):
                self._set(f"facts/{self.index}", text)
            problem = self._answer("answer")
        if problem:
            raise ValueError(f"{self.what}: {problem}")

    def _compare(self, text: str, digest: str) -> str:
        """What process 0 finds to be wrong; empty where nothing is."""
        others = range(1, self.count)
        found = {i: self._get(f"digest/{i}", lambda: self._absent("digest")) for i in others}
        if missing := [i for i in others if found[i] is None]:
            self._set("asked", "")
            return self._did_not_come(missing)
        different = [i for i in others if found[i] != digest]
        self._set("asked", digest if different else "")
        if not different:
            return ""
        theirs = {i: self._get(f"facts/{i}", lambda: different) for i in different}
        if missing := [i for i in different if theirs[i] is None]:
            return self._did_not_come(missing)
        every = [json.loads(theirs.get(i) or text) for i in range(self.count)]
        return "the processes do not do the same:\n  - " + "\n  - ".join(differences(every))

    def _answer(self, name: str) -> str:
        answer = self._get(name, lambda: self._absent("digest"))
        if answer is None:
            raise ValueError(f"{self.what}: {self._did_not_come(self._absent('digest') or [0])}")
        return answer

    def _did_not_come(self, missing: list[int]) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return (
            f"{_named(missing)} did not begin this within {self.limit:g} s, and process {self.index} did{detail}. All "
            "processes of a run call the same functions in the same order, with global batches of the same shapes. One "
            f"that is only late may be waited for longer: {PATIENCE}=SECONDS"
        )

    def _absent(self, kind: str) -> list[int]:
        """Which processes have not come yet."""
        try:
            here = {key.rsplit("/", 1)[-1] for key, _ in self.store.key_value_dir_get(self._key(kind))}
        except jax.errors.JaxRuntimeError:  # there is none
            here = set()
        return [i for i in range(self.count) if str(i) not in here]

    def _set(self, name: str, value: str) -> None:
        self.store.key_value_set(self._key(name), f"={value}")  # never empty, which the store may not tell from nothing

    def _get(self, name: str, missing: Any) -> str | None:
        """The value, once it is there; None at the end of the time."""
        while True:
            spent = time.monotonic() - self._began
            wait = max(min(self.limit - spent, _SLICE), 0.01)  # once at least: it may be there, whoever else is not
            try:
                return self.store.blocking_key_value_get(self._key(name), int(1000 * wait) + 1)[1:]
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if spent >= self.limit:
                return None
            if time.monotonic() - self._began > self._notice and (late := missing()):
                self._notice *= 2
                detail = f" ({self.detail})" if self.detail else ""
                print(
                    f"process {self.index} of {self.count} waits for {_named(late)} to begin: {self.what}{detail}; for "
                    f"{spent:.0f} s so far, {self.limit:g} s at most",
                    file=sys.stderr,
                    flush=True,
                )

    def _key(self, name: str) -> str:
        return f"shardlm/agreement/{self.number}/{name}"


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


def _named(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:20])) + (" and others" if len(indices) > 20 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def _same_devices() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        held = ", ".join(f"process {index} has {count}" for index, count in sorted(counts.items()))
        raise ValueError(f"the processes of a run have equally many devices, but {held}")
