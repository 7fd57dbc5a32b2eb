"""How far two correct programs may lie apart: from the arithmetic, and from how the reference reacts to rounding.

**Arithmetic.** A sum of n terms rounds n times. With roundings of random sign, eps/2 relative to the partial sum each,
the error relative to a typical result is about (eps / 2) sqrt(n / 2), for terms of one sign and of random signs alike;
two programs that add in another order differ by sqrt(2) times that, (eps / 2) sqrt(n). Errors of p products that feed
one another add in quadrature: (eps / 2) sqrt(n p). What is compared is the largest error in a leaf against the largest
element, both some standard deviations; a factor 4 covers their ratio:

    base = 2 eps sqrt(n p)      n: the longest sum (tokens of the batch, or a width of the model)
                                p: products in sequence, 6 in a layer forward, 12 backward, and 6 for embedding and head

When the computation is in bfloat16 or float16, sums are in float32, but every result is rounded to the narrow type: one
rounding for each product, eps_narrow sqrt(p), is added.

**Reaction.** The above takes the model for well conditioned, and an optimizer may be anything but: Adam divides by the
square root of a second moment, so where a gradient is rounding noise, so is an update of full size. Rounding a product
is the same as computing it exactly from weights moved by (eps / 2) sqrt(n) (backward error), so the reference is run a
second time from such parameters, each moved up or down at random, and the tolerance of a leaf is

    max(base, 16 x what the reference's own leaf changed by)

where 16 allows for the one random draw having been kind to the one element that decides. A narrow type moves every
element so much that the draw matters less, and what it does to an optimizer is already as large as it gets: there it
is 4. Integers, such as a count of updates, are equal or wrong.
"""

from typing import Any

import jax
import numpy as np

from shardlm.models.config import TransformerConfig

NOISE = 0.3
"""A leaf with a larger tolerance than this tells nothing: rounding alone decides its values."""


class Arithmetic:
    """The longest sum and the longest chain of products of one step.

    Args:
        config: the model, or None for a module that is not ours: then every matrix counts as three products in a row.
        params: arrays or their shapes, a tree.
        tokens: elements of the batch that a gradient is summed over.
        dtype: of the computation.
    """

    def __init__(self, config: TransformerConfig | None, params: Any, tokens: int, dtype: str):
        leaves = jax.tree.leaves(params)
        if config is None:
            self.width = max(max(leaf.shape, default=1) for leaf in leaves)
            self.layers = None
            self._products = 3 * sum(leaf.ndim > 1 for leaf in leaves)
        else:
            heads = config.num_heads * config.head_dim
            self.width = max(config.d_model, config.d_ff, heads, config.padded_vocab_size)
            self.layers = config.num_layers
            self._products = 0
        self.tokens = tokens
        narrow = dtype in ("bfloat16", "float16")
        self.eps = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
        self.reaction = 4 if narrow else 16
        self.narrow_eps = float(jax.numpy.finfo(dtype).eps) if narrow else 0.0

    def step(self) -> float:
        """`base` for a loss and its gradients."""
        products = self._products if self.layers is None else 18 * self.layers + 6
        return self._base(max(self.width, self.tokens), products)

    def forward(self, layers: int) -> float:
        """`base` for what a forward holds after so many layers."""
        return self._base(self.width, 6 * layers + 6)

    def rounding(self) -> float:
        """By what share of itself a weight is moved to see how the reference reacts."""
        return self.eps / 2 * np.sqrt(max(self.width, self.tokens)) + self.narrow_eps / 2

    def _base(self, terms: int, products: int) -> float:
        return 2 * self.eps * np.sqrt(terms * products) + self.narrow_eps * np.sqrt(products)
