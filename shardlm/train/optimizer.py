"""The default optimizer: AdamW with warm-up and cosine decay, clipping, and no decay where decay makes no sense."""

import jax
import optax

from shardlm._arguments import not_integer, not_number
from shardlm.parallel.zero import VECTORS


def decayed(params: dict) -> dict:
    """True for the parameters that weight decay applies to: all but norm scales and biases. A mask for Optax."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].key not in VECTORS, params)


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
    problems = [
        not_number("learning_rate", learning_rate, 0),
        not_number("final", final, 0, 1),
        not_number("b1", b1, 0, 1, open_end=True),
        not_number("b2", b2, 0, 1, open_end=True),
        not_number("weight_decay", weight_decay, 0),
    ]
    if not_integer("steps", steps, 1):
        problems.append(f"steps={steps!r}; the schedule needs the number of updates of the whole run, at least 1")
    elif warmup is not None and not_integer("warmup", warmup, 0, steps):
        problems.append(f"warmup={warmup!r} of steps={steps}; it is a whole number between 0 and steps")
    if clip is not None and (not_number("clip", clip, 0) or clip == 0):
        problems.append(f"clip={clip!r}; it is positive, or None not to clip")
    if problems := [problem for problem in problems if problem]:
        raise ValueError("adamw: " + "; ".join(problems))
    warmup = min(1000, steps // 10) if warmup is None else warmup
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, max(steps, warmup + 1), learning_rate * final
    )
    rule = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return rule if clip is None else optax.chain(optax.clip_by_global_norm(clip), rule)
