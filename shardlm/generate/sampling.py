"""From logits to a token: penalties, filters and the draw, each a function of logits[batch, vocab] to the same.

Order and meaning are those of transformers' logits processors: repetition penalty, temperature, top-k, top-p, min-p,
each on what the one before left. What is taken out is minus infinity. A draw depends on the request's seed and on how
many tokens it has made, and on nothing else, so neither the layout nor other rows of the batch change it.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SMALLEST = 1e-6  # of what logits are divided by


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together have at least this probability (arXiv:1904.09751).
        min_p: only tokens at least this times as likely as the likeliest (arXiv:2407.01082).
        repetition_penalty: logits of tokens that the prompt or the continuation holds are divided by it if positive,
            multiplied if negative (arXiv:1909.05858).

    Raises:
        ValueError: a setting is out of range, or has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.number):
                object.__setattr__(self, field.name, value.item())
        legal = {
            "temperature": (
                self.temperature,
                lambda x: x == 0 or SMALLEST <= x < math.inf,
                f"0 or a finite number above it, from {SMALLEST}: logits are divided by it in float32",
            ),
            "top_k": (
                self.top_k,
                lambda x: isinstance(x, int) and 1 <= x < 2**31,
                "a whole number of at least 1 and below 2**31, or None",
            ),
            "top_p": (self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1, or None"),
            "min_p": (self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1, or None"),
            "repetition_penalty": (
                self.repetition_penalty,
                lambda x: SMALLEST <= x < math.inf,
                f"above 0, a finite number from {SMALLEST}, or None",
            ),
        }
        problems = [
            f"{name}={value!r} is not {expected}"
            for name, (value, is_legal, expected) in legal.items()
            if value is not None and not (_is_number(value) and is_legal(value))
        ]
        if self.temperature is None:
            problems.append("temperature=None is not a number; 0 takes the likeliest token")
        if not problems and self.temperature == 0:
            problems += [
                f"{name}={value} has no effect at temperature=0, which takes the likeliest token"
                for name in ("top_k", "top_p", "min_p")
                if (value := getattr(self, name)) is not None
            ]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def kind(self) -> tuple[str, ...]:
        """What a compiled program has to know: which settings there are. Their values may differ from call to call."""
        given = (field.name for field in fields(self) if getattr(self, field.name) is not None)
        return tuple(name for name in given if name != "temperature" or self.temperature > 0)

    def values(self) -> dict[str, Any]:
        """The settings of `kind` by name."""
        return {name: getattr(self, name) for name in self.kind}


def penalise(logits: Array, seen: Array, penalty: Array | float) -> Array:
    """Make tokens less likely that were `seen`[batch, vocab]; see `Sampling.repetition_penalty`."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Array, k: Array | int) -> Array:
    """Keep the k largest of each row, and what is as large as the last of them."""
    ascending = jnp.sort(logits, axis=-1)
    at = jnp.maximum(logits.shape[-1] - k, 0)
    return jnp.where(logits < jax.lax.dynamic_index_in_dim(ascending, at, axis=-1), -jnp.inf, logits)


def keep_top_p(logits: Array, p: Array | float) -> Array:
    """Take out the least likely tokens that together have a probability of at most 1 - p; equal ones stay together."""
    ascending = jnp.sort(logits, axis=-1)
    taken = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    taken = taken.at[:, -1].set(False)
    least = jnp.where(taken, jnp.inf, ascending).min(axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_min_p(logits: Array, p: Array | float) -> Array:
    """Take out tokens less than p times as likely as the likeliest."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < p * probabilities.max(axis=-1, keepdims=True), -jnp.inf, logits)


def process(logits: Array, seen: Array | None, kind: tuple[str, ...], values: dict[str, Any]) -> Array:
    """All of `Sampling`'s settings, in their order.

    Args:
        logits: [batch, vocab], of the model.
        seen: bool[batch, vocab], tokens of the prompt or the continuation; needed by a repetition penalty alone.
        kind, values: of a `Sampling`.
    """
    if "repetition_penalty" in kind:
        assert seen is not None
        logits = penalise(logits, seen, values["repetition_penalty"])
    if "temperature" in kind:
        logits = logits / values["temperature"]
    for name, keep in (("top_k", keep_top_k), ("top_p", keep_top_p), ("min_p", keep_min_p)):
        if name in kind:
            logits = keep(logits, values[name])
    return logits


def draw(logits: Array, seeds: Array, made: Array) -> Array:
    """A token of each row from softmax(logits): int32[batch].

    Args:
        logits: [batch, vocab].
        seeds: uint32[batch], of the requests.
        made: int32[batch], how many tokens each request has made.
    """

    def one(row: Array, seed: Array, index: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), row)

    return jax.vmap(one)(logits, seeds, made).astype(jnp.int32)


def choose(
    logits: Array, seen: Array | None, seeds: Array, made: Array, kind: tuple[str, ...], values: dict[str, Any]
) -> Array:
    """The next token of each row, int32[batch]; arguments as above."""
    logits = process(logits, seen, kind, values)
    return draw(logits, seeds, made) if "temperature" in kind else logits.argmax(axis=-1).astype(jnp.int32)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
