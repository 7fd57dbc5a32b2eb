"""Text from a model in training: samples by running the whole window again for each token.

Right on any layout and simple; no cache of keys and values, so for looking at a run and not for serving.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from shardlm._arguments import LARGEST_SEED, not_integer
from shardlm._errors import is_int
from shardlm.train import engine, room
from shardlm.train.kinds import require_trainer
from shardlm.train.program import require_devices
from shardlm.train.state import TrainState, check_usable

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer


_COLDEST = 1e-6  # what logits are divided by, in float32


def sample(
    trainer: "Trainer",
    state: TrainState,
    prompt: np.ndarray,
    *,
    tokens: int,
    window: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> np.ndarray:
    """Continue `prompt` by `tokens` ids, drawn from softmax(logits / temperature), or the likeliest at temperature 0.

    Args:
        trainer: of the manual engine or the auto one; the forward runs on its layout.
        state: its `params` are used.
        prompt: int[n], at least one id.
        tokens: how many ids to add.
        window: length of the context in tokens, which slides once it is full; a multiple of the tensor axis under
            sequence parallelism.
        temperature: 0, or a number above it.
        seed: of the draws, from 0 to 2**32 - 1, which are the same on every layout up to rounding of the logits.

    Returns:
        int32[tokens].

    Raises:
        ValueError: an argument is out of range, or the window does not fit the model or its layout.
    """
    require_trainer(trainer)
    require_devices(trainer.mesh)
    check_usable(state, trainer.abstract_state)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        ids = np.asarray(prompt, object)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"sample: the prompt is {ids.dtype}{list(ids.shape)}; it is one row of at least one token id")
    vocabulary = trainer.config.vocab_size
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"sample: the prompt's ids go from {ids.min()} to {ids.max()}; the model has 0 to {vocabulary - 1}"
        )
    legal = {
        "window": (window, is_int(window) and window >= 1, "a whole number from 1"),
        "tokens": (tokens, is_int(tokens) and tokens >= 1, "a whole number from 1"),
        "temperature": (temperature, _is_temperature(temperature), f"0, or a finite number from {_COLDEST}"),
    }
    problems = [f"{name}={value!r}; it is {what}" for name, (value, good, what) in legal.items() if not good]
    if problems := [*problems, *filter(None, [not_integer("seed", seed, 0, LARGEST_SEED)])]:
        raise ValueError(f"sample: {'; '.join(problems)}")
    trainer.layout.check(trainer.config, sequence=window)
    forward, rows = engine.logits(trainer.plan), trainer.layout.batch_shards
    _check_memory(trainer, tokens, window)

    def draw(params: engine.Parameters, context: Array, last: Array, key: Array) -> Array:
        logits = forward(params, jnp.broadcast_to(context, (rows, window)))[0, last, :vocabulary]
        if temperature == 0:
            return logits.argmax().astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def run(params: engine.Parameters, context: Array, length: Array) -> Array:
        def body(carry: tuple[Array, Array], key: Array):
            context, length = carry
            token = draw(params, context, length - 1, key)
            full = length == window
            context = jnp.where(full, jnp.roll(context, -1), context)
            at = jnp.where(full, window - 1, length)
            return (context.at[at].set(token), jnp.minimum(length + 1, window)), token

        keys = jax.random.split(jax.random.key(seed), tokens)
        return jax.lax.scan(body, (context, length), keys)[1]

    kept = ids[-window:]
    context = np.zeros(window, np.int32)
    context[: kept.size] = kept
    whole = NamedSharding(trainer.mesh, PartitionSpec())
    result = trainer._run(jax.jit(run, out_shardings=whole), state.params, context, np.int32(kept.size))
    return np.asarray(result)


def _is_temperature(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    return bool(value == 0 or _COLDEST <= value < np.inf)


def _check_memory(trainer: "Trainer", tokens: int, window: int) -> None:
    """Refuse a window or a length whose least arrays no device holds: one row of logits, and a key for each token."""
    logits = 4 * window * trainer.config.padded_vocab_size // trainer.layout.tensor
    needs = {"one row of logits": logits, "the draws": 12 * tokens}
    hint = " Ask for fewer tokens or a smaller window, or use sl.generate, which has a cache"
    room.require(
        needs, list(trainer.mesh.devices.flat), f"sample: tokens={tokens:,}, window={window:,}", lambda _: hint
    )
