"""The program of our own Transformer: either engine, batches of tokens, and what a run says of it."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from shardlm._text import fold, size, table
from shardlm.layout import Layout
from shardlm.models.config import TransformerConfig
from shardlm.models.kinds import require_config
from shardlm.models.transformer import Transformer, count_parameters
from shardlm.train import arrange
from shardlm.train import batch as batches
from shardlm.train import engine as engines
from shardlm.train.engine import Parameters, Plan, flatten
from shardlm.train.frozen import trained
from shardlm.train.metrics import model_flops_per_token
from shardlm.train.program import Gradients, Variables, Work, mesh_on

# What a resumed run may change of its model: how it is computed, and what holds for training or its beginning alone.
_MAY_CHANGE = ("dtype", "attention/implementation", "dropout", "init_std", "lora/base")


@dataclass(frozen=True)
class TransformerProgram:
    """A `TransformerConfig` on a layout; see `program.Program`.

    Attributes:
        plan: how the parameters are split.
        engine: `"manual"` or `"auto"`.
        batch_sharding: of a batch array [batch, sequence].
    """

    plan: Plan
    engine: str
    batch_sharding: NamedSharding
    weight_name: str = "tokens"
    variables: Variables = field(default_factory=dict)
    _checked: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, config: TransformerConfig, layout: Layout, devices: Any, engine: str) -> "TransformerProgram":
        """Plan `config` on `layout`, whose sizes are filled in; `LayoutError` where the model does not fit."""
        require_config(config)
        if engine not in engines.ENGINES:
            raise ValueError(f"engine={engine!r}; it is one of {', '.join(map(repr, engines.ENGINES))}")
        layout.check(config)
        if engine == "auto" and layout.pipe > 1:
            warnings.warn(
                f"engine='auto' runs no schedule: {layout.pipeline} has no effect, the compiler moves layers or "
                "activations over pipe as it sees fit. It is there to check the numbers of engine='manual'.",
                stacklevel=4,
            )
        if "float64" in (config.dtype, config.param_dtype) and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"dtype={config.dtype!r}, param_dtype={config.param_dtype!r}: JAX computes in float64 only after "
                'jax.config.update("jax_enable_x64", True)'
            )
        parts = math.prod(layout.sizes[axis] for axis in layout.vocabulary_axes)
        if config.padded_vocab_size % parts:
            config = dataclasses.replace(config, vocab_multiple=math.lcm(config.vocab_multiple, parts))
        plan = Plan.of(config, layout, mesh_on(layout, devices))
        return cls(plan, engine, NamedSharding(plan.mesh, plan.batch_spec()))

    @property
    def config(self) -> TransformerConfig:
        """The model, its vocabulary padded as the layout needs."""
        return self.plan.config

    def on_one_device(self, device: Any) -> "TransformerProgram":
        """The model as plain JAX on one device: no collective of ours, no accumulation, nothing recomputed."""
        return TransformerProgram.of(self.config, Layout(), [device], "auto")

    @property
    def layer_rows(self) -> tuple[Any, ...] | None:
        """Where a pipeline stores layers otherwise than in the model's order, which each row is."""
        stages = self.plan.stages
        rows = stages.rows.tolist()
        return tuple(map(tuple, rows) if stages.chunks > 1 else rows) if stages.arranged else None

    def in_order(self, tree: Any) -> Any:
        """Layers in the model's order and on every stage."""
        return arrange.gathered(tree, self.plan.stages, self.plan.splits)

    def arrange(self, tree: Any) -> Any:
        """The inverse of `in_order`, of NumPy arrays."""
        return arrange.arrange(tree, self.plan.stages, self.plan.splits)

    @property
    def title(self) -> str:
        """The model in words."""
        c = self.config
        return (
            f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads ({c.num_kv_heads} kv) of {c.head_dim}, "
            f"d_ff {c.d_ff}, vocabulary {c.vocab_size}"
        )

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters, padding of the vocabulary not counted."""
        return count_parameters(self.config)

    def initialize(self, seed: int) -> tuple[Parameters, Variables]:
        """The parameters of `Transformer(config, rngs=nnx.Rngs(seed))`; it has no variables."""
        stages = self.plan.stages
        _, state = nnx.split(Transformer(self.config, rngs=nnx.Rngs(seed), rows=stages.rows))
        params = nnx.to_pure_dict(state)
        return (arrange.without_padding(params, stages, self.plan.splits) if stages.padding else params), {}

    def gradients(self, params: Parameters, variables: Variables, batch: dict[str, Array], key: Array) -> Gradients:
        """Loss and gradients; `key` is of the dropout masks."""
        return Gradients(*engines.loss_and_grads(self.plan, self.engine)(params, batch, key), variables)

    def evaluate(self, params: Parameters, batch: dict[str, Array], variables: Variables | None = None):
        """Sum of losses and sum of weights, without dropout."""
        return engines.evaluate(self.plan, self.engine)(params, batch)

    def stored(self, shards: Parameters) -> Parameters:
        """Updated parameters where they are stored: the manual engine gathers them in the open."""
        if self.engine == "auto":
            return jax.lax.with_sharding_constraint(shards, trained(self.plan.shardings("stored"), self.plan.splits))
        return engines.gather_updated(self.plan, shards)

    def place(self, batch: Mapping[str, Any], *, may_be_empty: bool = False) -> dict[str, Array]:
        """Check a batch and put it on the devices; see `Trainer.place`."""
        shape = batches.check_structure(batch, self.config.max_sequence)
        placed = batches.is_placed(batch, self.batch_sharding)
        self._check_shape(shape, is_global=placed)
        if placed:
            return dict(batch)
        host = batches.to_host(batch)
        batches.check_values(host, self.config.vocab_size, self.config.max_sequence, may_be_empty=may_be_empty)
        return batches.place(host, self.batch_sharding)

    def abstract_batch(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `place` makes of a batch, as shapes; a batch of shapes is the global one."""
        shape = batches.check_structure(batch, self.config.max_sequence, may_be_abstract=True)
        is_global = any(isinstance(x, jax.ShapeDtypeStruct) for x in batch.values())
        is_global = is_global or batches.is_placed(batch, self.batch_sharding)
        rows = self._check_shape(shape, is_global)
        return {
            name: jax.ShapeDtypeStruct((rows, shape[1]), batches.dtype_of(name), sharding=self.batch_sharding)
            for name in dict.fromkeys((*batch, "weights"))
        }

    def check_rows(self, batch_size: int) -> None:
        """Raise LayoutError where a global batch of so many rows cannot be split."""
        self.plan.layout.check(self.config, batch_size=batch_size)

    def padded_rows(self, path: str, shape: tuple[int, ...]) -> int | None:
        """How many rows of a table over the vocabulary, or of an optimizer moment of it, are real."""
        tables, known = ("embedding/table", "head/table"), (self.config.padded_vocab_size, self.config.vocab_size)
        return self.config.vocab_size if path.endswith(tables) and shape[:1] and shape[0] in known else None

    def describe(self, held: Mapping[str, int], *, parameters: bool) -> str:
        """The layout's table for this model, what ZeRO leaves whole, bytes; a line for each parameter on request."""
        plan, config = self.plan, self.config
        lines = [plan.layout.describe(config)]
        whole = [split for split in plan.splits.values() if not split.zero_axes] if plan.table.zero_axes else []
        if whole:
            sizes = [f"{split.path} {split.shape}" for split in whole]
            lines.append(f"not split by ZeRO, as no dim divides by fsdp={plan.layout.fsdp}: {', '.join(sizes)}")
        if config.lora is not None:
            count = sum(math.prod(split.shape) for split in plan.in_order.values() if not split.frozen)
            targets = ", ".join(config.lora.targets)
            lines.append(
                f"trained are {count:,} of {self.num_parameters:,} parameters, {count / self.num_parameters:.2%}: "
                f"adapters of rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {targets}"
            )
        lines.append(
            f"{self.num_parameters:,} parameters ({config.param_dtype}, computing in {config.dtype}); on each device "
            f"{size(held['params'])} of parameters and {size(held['opt_state'])} of optimizer state"
        )
        return "\n".join([lines[0], *map(fold, lines[1:]), *([self._table()] if parameters else [])])

    def evaluation(self, loss: float, weight: float) -> dict[str, float]:
        """Loss, perplexity and tokens."""
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": weight}

    def work(self, batch: Mapping[str, Any]) -> Work:
        """Tokens, padding included."""
        rows, sequence = batch["tokens"].shape
        return Work("tokens", rows * sequence, model_flops_per_token(self.config, sequence), self.config.dtype)

    def identity(self) -> dict[str, Any]:
        """The configuration."""
        return {"config": self.config.to_dict()}

    def changes(self, saved: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """Settings that differ and may; see `program.Program`."""
        if "config" not in saved:
            raise ValueError(
                f"the checkpoint of {where} does not say what its model is, so fit did not save it: use sl.restore"
            )
        before = flatten(TransformerConfig.from_dict(saved["config"]).to_dict())
        now = flatten(self.config.to_dict())
        changed = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
        legal = {key: changed.pop(key) for key in _MAY_CHANGE if key in changed}
        changed.pop("vocab_multiple", None)  # padding follows the layout
        changed.pop("origin", None)  # is no part of the model
        if changed:
            differences = "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in changed.items())
            raise ValueError(f"the checkpoint of {where} is of another model: {differences}")
        return legal

    def _check_shape(self, shape: tuple[int, int], is_global: bool) -> int:
        """The rows of the global batch, which are checked once for each shape."""
        layout = self.plan.layout
        rows = shape[0] if is_global else batches.global_rows(self.batch_sharding, layout.batch_shards, shape[0])
        if (rows, shape[1]) not in self._checked:
            layout.check(self.config, batch_size=rows, sequence=shape[1])
            self._checked.add((rows, shape[1]))
        return rows

    def _table(self) -> str:
        rows = []
        for path, leaf in flatten(self.plan.shapes).items():
            split = self.plan.splits[path]
            dims = ", ".join(str(dim) for dim in split.dims)
            spec = f"P({', '.join(map(repr, split.stored))})"
            shard = NamedSharding(self.plan.mesh, split.stored).shard_shape(leaf.shape)
            rows.append((path, str(leaf.shape), dims, spec, f"{math.prod(shard) * leaf.dtype.itemsize:,}"))
        return table(("parameter", "shape", "dims", "stored as", "bytes per device"), rows, gap=2)
