"""Our optimizers: AdamW, the default, and Muon, with warm-up, cosine decay, clipping, and no decay of vectors.

Layers are stacked: a norm scale of all layers is one array of two dims, a layer's matrix of three or four. So rules by
the number of dims, as those of Optax are, would take vectors for matrices. The functions here go by the names.
"""

from collections.abc import Mapping

import jax
import optax

from shardlm._arguments import not_integer, not_number
from shardlm.models.config import TransformerConfig
from shardlm.models.transformer import parameter_dims
from shardlm.parallel.zero import VECTORS, WEIGHTS
from shardlm.train.paths import flatten, unflatten

_ROWS_OF_SEVERAL_DIMS = ("output/kernel", "/lora_a")  # whose last dim alone is the product's output


def decayed(params: dict) -> dict:
    """True for the parameters that weight decay applies to: all but norm scales and biases. A mask for Optax.

    Tables of tokens and positions are decayed.

    Example:
        >>> optimizer = optax.lion(1e-4, weight_decay=0.1, mask=sl.decayed)
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"decayed: params is a {type(params).__name__}; it is the nested dict of parameters")
    return jax.tree_util.tree_map_with_path(lambda keys, _: _name(keys[-1]) not in VECTORS, params)


def matrix_dims(config: TransformerConfig) -> dict:
    """Which dims of a Transformer's parameters are the rows and the columns of a matrix, for Optax's Muon.

    Of each layer's kernels the dims that a product sums over are the rows, all others the columns; the dim of the
    layers is neither, so each layer's matrix is taken for itself. `attention/query/kernel` [layer, embed, head,
    head_dim] is a matrix of embed x (head head_dim), `attention/output/kernel` [layer, head, head_dim, embed] one of
    (head head_dim) x embed. Tables, norm scales and biases are no matrices.

    Args:
        config: the model. With adapters, only they are trained, and only they are named.

    Returns:
        A nested dict like the parameters that are trained: `optax.contrib.MuonDimensionNumbers`, or None.

    Example:
        >>> optimizer = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=sl.matrix_dims(config))
    """
    shapes = flatten(parameter_dims(config)[1])
    if config.lora is not None:
        shapes = {path: leaf for path, leaf in shapes.items() if path.endswith(("/lora_a", "/lora_b"))}
    return _dims_of(unflatten(shapes))


def adamw(
    learning_rate: float = 1e-3,
    *,
    steps: int,
    warmup: int | None = None,
    final: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) after clipping by the global norm, its rate warmed up, then decayed by a cosine.

    Args:
        learning_rate: the peak.
        steps: updates in the whole run; the cosine ends there.
        warmup: updates until the peak; None is a tenth of `steps`, rounded down, at most 1000.
        final: the rate at the end, as a fraction of the peak.
        b1, b2: decay of the moments.
        weight_decay: not applied to norm scales and biases.
        clip: the largest global norm of a gradient; None does not clip.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> trainer = sl.Trainer(config, layout, sl.adamw(1e-3, steps=1000))
    """
    _check_decays("adamw", b1=b1, b2=b2)
    schedule = _schedule("adamw", learning_rate, steps, warmup, final, weight_decay, clip)
    rule = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return rule if clip is None else optax.chain(optax.clip_by_global_norm(clip), rule)


def muon(
    learning_rate: float = 1e-3,
    *,
    steps: int,
    warmup: int | None = None,
    final: float = 0.1,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Muon for the matrices of every layer, Adam for tables, norm scales and biases.

    A matrix's update is its momentum, made orthogonal by Newton-Schulz iterations (`optax.contrib.muon`), times 0.2
    sqrt(max(rows, columns)), which makes it as large as an update of Adam's, so that rates and weight decay that suit
    `sl.adamw` suit it too (arXiv:2502.16982, section 2.2). What is a matrix, is told in `sl.matrix_dims`.

    Args:
        learning_rate, steps, warmup, final, weight_decay, clip: as of `sl.adamw`, of all parameters.
        beta: decay of the matrices' momentum.
        b1, b2: decay of Adam's moments.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> trainer = sl.Trainer(config, layout, sl.muon(1e-3, steps=1000))
    """
    _check_decays("muon", beta=beta, b1=b1, b2=b2)
    schedule = _schedule("muon", learning_rate, steps, warmup, final, weight_decay, clip)
    matrices = optax.contrib.muon(1.0, beta=beta, consistent_rms=0.2, muon_weight_dimension_numbers=_dims_of)
    others = optax.adam(1.0, b1=b1, b2=b2)
    rule = optax.chain(
        optax.partition({"matrix": matrices, "other": others}, _kinds),
        # Their rate of 1 has made updates of directions, so what decays is subtracted, and the schedule keeps the sign.
        optax.add_decayed_weights(-weight_decay, mask=decayed),
        optax.scale_by_schedule(schedule),
    )
    return rule if clip is None else optax.chain(optax.clip_by_global_norm(clip), rule)


def _check_decays(name: str, **decays: float) -> None:
    """Raise ValueError for decays of moments that are no numbers from 0 to below 1."""
    problems = [not_number(decay, value, 0, 1, open_end=True) for decay, value in decays.items()]
    if problems := [problem for problem in problems if problem]:
        raise ValueError(f"{name}: " + "; ".join(problems))


def _schedule(
    name: str,
    learning_rate: float,
    steps: int,
    warmup: int | None,
    final: float,
    weight_decay: float,
    clip: float | None,
) -> optax.Schedule:
    """Warm-up and cosine decay; raises what is wrong with any of the numbers."""
    problems = [
        not_number("learning_rate", learning_rate, 0),
        not_number("final", final, 0, 1),
        not_number("weight_decay", weight_decay, 0),
    ]
    if not_integer("steps", steps, 1):
        problems.append(f"steps={steps!r}; the schedule needs the number of updates of the whole run, at least 1")
    elif warmup is not None and not_integer("warmup", warmup, 0, steps):
        problems.append(f"warmup={warmup!r} of steps={steps}; it is a whole number between 0 and steps")
    if clip is not None and (not_number("clip", clip, 0) or clip == 0):
        problems.append(f"clip={clip!r}; it is positive, or None not to clip")
    if problems := [problem for problem in problems if problem]:
        raise ValueError(f"{name}: " + "; ".join(problems))
    warmup = min(1000, steps // 10) if warmup is None else warmup
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, max(steps, warmup + 1), learning_rate * final
    )


def _dims_of(params: dict) -> dict:
    """`matrix_dims` of parameters, or of a part of them."""

    def dims(keys: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        path, stacked = "/".join(map(_name, keys)), int(_name(keys[0]) == "layers" and leaf.ndim > 2)
        if not f"/{path}".endswith(WEIGHTS) or leaf.ndim < 2:
            return None
        inward = leaf.ndim - 1 - stacked if path.endswith(_ROWS_OF_SEVERAL_DIMS) else 1
        rows, columns = range(stacked, stacked + inward), range(stacked + inward, leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(rows), tuple(columns))

    return jax.tree_util.tree_map_with_path(dims, params)


def _kinds(params: dict) -> dict:
    def is_leaf(x: object) -> bool:
        return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)

    return jax.tree.map(lambda dims: "other" if dims is None else "matrix", _dims_of(params), is_leaf=is_leaf)


def _name(key: object) -> str:
    """A key of a path as text."""
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
