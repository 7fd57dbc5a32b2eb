"""What a checkpoint says of its run beside the model: which batches it has used, and with what it was trained."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from shardlm.checkpoint.keys import as_numbers
from shardlm.train.engine import flatten, unflatten
from shardlm.train.frozen import trained

if TYPE_CHECKING:
    from shardlm.train.trainer import Trainer

_NUMBER = re.compile(r"(?<![\w.])-?(?:inf|nan|\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?=:[a-z]+\d+\[\])")  # a literal of a jaxpr

OWN = "the caller's own"  # batches of which nothing is known but how many were used


def describe_run(trainer: "Trainer", batches: Any, steps: int, held_out: Any) -> dict[str, Any]:
    """What is the same in a run that goes on as it began, by name; JSON can hold it.

    Args:
        trainer, batches, steps, held_out: of `fit`.
    """
    return {
        "steps": int(steps),
        "processes": jax.process_count(),
        "batches": batches_of(batches),
        "held_out": _held_out(held_out),
        "optimizer": optimizer_of(trainer),
    }


def is_run(value: Any) -> bool:
    """Whether it is what `describe_run` and `Used.record` make, as far as a resumed run reads it."""

    def whole(x: Any) -> bool:
        return x is None or isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 63

    def text(x: Any) -> bool:
        return x is None or isinstance(x, str)

    if not isinstance(value, Mapping):
        return False
    batches, optimizer, batch = (value.get(name) for name in ("batches", "optimizer", "batch"))
    return (
        all(whole(value.get(name)) for name in ("steps", "processes", "rows"))
        and all(text(value.get(name)) for name in ("held_out", "last_batch"))
        and (batches is None or isinstance(batches, Mapping) and isinstance(batches.get("kind"), str))
        and all(whole((batches or {}).get(name)) for name in ("batch_size", "sequence", "rows", "position"))
        and (optimizer is None or isinstance(optimizer, Mapping) and _is_list(optimizer.get("numbers"), text))
        and (batch is None or isinstance(batch, Mapping) and all(_is_list(x, whole) and x for x in batch.values()))
    )


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def batches_of(batches: Any) -> dict[str, Any]:
    """What is known of a source of batches: all that decides them of `shardlm.data.Batches`, else only that it is own.

    Of Batches: `batch_size`, `seed`, `sequence`, `rows`, and `digest` of their content.
    """
    identity = getattr(batches, "identity", None)
    return {"kind": "Batches", **identity} if isinstance(identity, Mapping) else {"kind": OWN}


def digest_of(batch: Any) -> str | None:
    """A digest of a batch's names, dtypes and values; None where they are not in the host's memory."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not isinstance(leaf, np.ndarray) or leaf.dtype.hasobject:
            return None
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:32]


def optimizer_of(trainer: "Trainer") -> dict[str, Any] | None:
    """Digests of what the optimizer computes and of what its state begins with, and the numbers in them.

    Those are its rates, its decays and the steps of its schedule.

    Optax's transformations are functions, which do not say their settings. Tracing an update shows them: every number
    that was given is a literal in it. The parameters that it is traced on have the model's names and 2 in every dim, so
    that the layout makes no difference. None where an update cannot be traced so.
    """
    if "_optimizer_of" not in trainer.__dict__:
        trainer.__dict__["_optimizer_of"] = _traced(trainer)
    return trainer.__dict__["_optimizer_of"]


def _traced(trainer: "Trainer") -> dict[str, Any] | None:
    dims = {path: len(split.shape) for path, split in trainer.plan.in_order.items()}
    leaves = flatten(trained(trainer.plan.shapes, trainer.plan.splits))
    small = unflatten({path: jax.ShapeDtypeStruct((2,) * dims[path], x.dtype) for path, x in leaves.items()})
    try:
        state = jax.eval_shape(trainer.optimizer.init, small)
        begun = jax.make_jaxpr(trainer.optimizer.init)(small)
        more = isinstance(trainer.optimizer, optax.GradientTransformationExtraArgs)  # those that want the loss
        loss = {"value": jax.ShapeDtypeStruct((), np.float32)} if more else {}
        traced = jax.make_jaxpr(trainer.optimizer.update)(small, state, small, **loss)
    except Exception:  # whatever an optimizer of others does not like about them
        return None
    texts = [re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)) for program in (begun, traced)]
    # Once as given and once as rounded to float32: the same to six digits.
    numbers = sorted({f"{abs(float(number)):.6g}" for text in texts for number in _NUMBER.findall(text)}, key=float)
    return {"digest": _digest(traced, texts[1]), "start": _digest(begun, texts[0]), "numbers": numbers}


def _digest(program: Any, text: str) -> str:
    """A digest of a traced program's words, whatever order sets are printed in, and of its arrays."""
    digest = hashlib.sha256(json.dumps(sorted(Counter(re.findall(r"[\w.+-]+", text)).items())).encode())
    for constant in program.consts:
        digest.update(np.asarray(as_numbers(constant)).tobytes())
    return digest.hexdigest()[:32]


def _held_out(held_out: Any) -> str | None:
    """A digest of the batches to evaluate on; None where there are none, or they cannot be told."""
    if not isinstance(held_out, Sequence) or jax.process_count() > 1:
        return None
    digests = [digest_of(batch) for batch in held_out]
    return None if None in digests else hashlib.sha256("".join(map(str, digests)).encode()).hexdigest()[:32]
