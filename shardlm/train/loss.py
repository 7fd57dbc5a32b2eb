"""What training minimises: the weighted negative log-likelihood, as a sum and its weight, never a mean of means."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from shardlm.models import embedding
from shardlm.models.dropout import Dropout
from shardlm.models.stack import PLAIN, Execution
from shardlm.models.transformer import Transformer


def loss_sum(
    model: Transformer, batch: Mapping[str, Array], dropout: Dropout | None = None, execution: Execution = PLAIN
) -> Array:
    """sum(weight * -log p(target)) over the tokens held here.

    Args:
        model: a Transformer, with whole parameters or, inside `shard_map`, a device's own.
        batch: "tokens", "targets" int32[batch, sequence]; "weights" float32[batch, sequence]; perhaps "segments",
            "positions".
        dropout: the masks of a training step, or None.
        execution: how to run the layers.

    Returns:
        A scalar, float32 or wider. The loss of a batch is the sum of these over whatever it was split into, divided by
        the sum of all weights. NaN if a token or a target is outside the vocabulary.
    """
    hidden = model.hidden(
        batch["tokens"],
        segments=batch.get("segments"),
        positions=batch.get("positions"),
        dropout=dropout,
        execution=execution,
    )
    return nll_sum(model, hidden, batch)


def nll_sum(model: Transformer, hidden: Array, batch: Mapping[str, Array]) -> Array:
    """`loss_sum` from the last layer's output on."""
    targets = batch["targets"]
    nll = embedding.cross_entropy(model.logits(hidden), targets, model.config)
    nll = jnp.where((targets >= 0) & (targets < model.config.vocab_size), nll, jnp.nan)
    # A weight of zero hides a token whatever its target, so that padding may hold any id: 0 * NaN would be NaN.
    return jnp.where(batch["weights"] == 0, 0, batch["weights"] * nll).sum()
