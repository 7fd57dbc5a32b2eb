"""What a decoder-only Transformer is: one frozen configuration, its parts grouped by what they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from shardlm._dtypes import FLOATS, full_name

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Normalisation of the residual stream.

    Attributes:
        kind: `"rms"` (arXiv:1910.07467) or `"layer"` (arXiv:1607.06450; with a bias).
        epsilon: added to the variance, or to the mean square.
        one_plus_scale: multiply by (1 + w) with w starting at zero, as Gemma does, and not by w starting at one.
        after: normalise each branch's output as well as its input (Gemma 2 and 3), and not its input alone.
    """

    kind: str = "rms"
    epsilon: float = 1e-6
    one_plus_scale: bool = False
    after: bool = False

    def __post_init__(self):
        problems = [] if self.kind in ("rms", "layer") else [f"kind={self.kind!r}; it is one of 'rms', 'layer'"]
        _raise("Norm", problems + _not_positive(self, "epsilon"))


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """RoPE position interpolation: every frequency divided by `factor` (arXiv:2306.15595)."""

    factor: float

    def __post_init__(self):
        _raise("LinearScaling", _not_positive(self, "factor"))


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1 and later: long wavelengths divided by `factor`, short ones kept, a ramp between.

    Attributes:
        factor: divisor of the lowest frequencies.
        low_frequency_factor: wavelengths above `original_length / low_frequency_factor` are scaled in full.
        high_frequency_factor: wavelengths below `original_length / high_frequency_factor` are kept.
        original_length: context length, in tokens, that the model was first trained with.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        low, high = "low_frequency_factor", "high_frequency_factor"
        problems = _not_positive(self, "factor", low, high, "original_length")
        if not problems and self.low_frequency_factor >= self.high_frequency_factor:
            problems.append(f"{low}={self.low_frequency_factor} is not below {high}={self.high_frequency_factor}")
        _raise("Llama3Scaling", problems)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding, half-split (arXiv:2104.09864): base `theta`, and how frequencies are scaled."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def __post_init__(self):
        _raise("Rope", _not_positive(self, "theta"))


@dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A table of `length` learned position vectors added to the embeddings (GPT-2)."""

    length: int

    def __post_init__(self):
        if not _positive(self.length):
            raise ValueError(f"LearnedPositions: length={self.length!r}; it is a positive integer")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention beyond its sizes.

    Attributes:
        bias: biases on the query, key and value projections (Qwen 2, GPT-2).
        output_bias: bias on the output projection (GPT-2).
        qk_norm: RMSNorm over `head_dim` on queries and keys before RoPE (Qwen 3, Gemma 3).
        scale: multiplies the scores; None is `head_dim ** -0.5`.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)` (Gemma 2).
        windows: a pattern of sliding windows in tokens, repeated over the layers; None in it attends to everything
            before. `(4096,)` is Mistral, `(4096, None)` Gemma 2, `(512,) * 5 + (None,)` the small Gemma 3. A query at
            i sees keys j with i - j < window.
        implementation: `"xla"`; `"chunked"`, which does a part of the queries at a time and so needs memory in
            proportion to the sequence and not to its square, for making the scores again in backward; or `"cudnn"`, the
            fused kernel of NVIDIA GPUs (bfloat16 or float16, no soft cap).
    """

    bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    implementation: str = "xla"

    def __post_init__(self):
        problems = []
        if self.implementation not in ("xla", "chunked", "cudnn"):
            problems.append(f"implementation={self.implementation!r}; it is one of 'xla', 'chunked', 'cudnn'")
        if self.implementation == "cudnn" and self.soft_cap is not None:
            problems.append("the cudnn kernel has no soft cap: use implementation='chunked', or soft_cap=None")
        fine = isinstance(self.windows, tuple) and all(w is None or _positive(w) for w in self.windows)
        if not fine or not self.windows:
            problems.append(f"windows={self.windows!r}; it is a non-empty tuple of positive token counts or None")
        _raise("Attention", problems + _not_positive(self, "scale", "soft_cap", or_none=True))


@dataclass(frozen=True, kw_only=True)
class MLP:
    """The feed-forward branch: gated (SwiGLU and kin, arXiv:2002.05202) or plain, its activation and biases."""

    gated: bool = True
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"MLP: activation={self.activation!r}; it is one of {', '.join(ACTIVATIONS)}")


TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on chosen projections (arXiv:2106.09685, section 4.1); with them nothing else is trained.

        y = x W + (alpha / rank) (x A) B        A[in, rank], B[rank, out]

    A starts as the paper's Gaussian, its variance 1 / (3 in) that of PEFT's and the authors' code, which draw it
    uniformly; B starts at zero, so that the model is at first what it was. Both are stored in at least float32,
    whatever the model's `param_dtype`.

    Attributes:
        rank: columns of A.
        alpha: the product is multiplied by `alpha / rank`.
        targets: which projections of each layer: of "query", "key", "value", "output", "gate", "up", "down".
        base: name or folder of the model that the adapters are for, as `sl.load_lora` reads and `sl.save_lora` writes
            it; nothing that is computed depends on it.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    base: str | None = None

    def __post_init__(self):
        problems = [] if _positive(self.rank) else [f"rank={self.rank!r}; it is a positive integer"]
        problems += _not_positive(self, "alpha")
        named = self.targets if isinstance(self.targets, tuple) else ()
        if unknown := [target for target in named if target not in TARGETS]:
            problems.append(f"targets has {', '.join(map(repr, unknown))}; they are of {', '.join(TARGETS)}")
        if twice := sorted({str(target) for target in named if named.count(target) > 1}):
            problems.append(f"targets has {', '.join(map(repr, twice))} more than once")
        if not named:
            problems.append(f"targets={self.targets!r}; it is a non-empty tuple, of {', '.join(TARGETS)}")
        if not isinstance(self.base, str | None):
            problems.append(f"base={self.base!r}; it is a string or None")
        _raise("Lora", problems)

    @property
    def scale(self) -> float:
        """What multiplies x A B."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only Transformer; the defaults are those of Llama.

    Attributes:
        vocab_size: number of token ids. The table is padded to a multiple of `vocab_multiple` rows
            (`padded_vocab_size`), which receive neither probability nor gradient, so that it splits over devices and
            has the same shape on every layout that divides it.
        num_layers, d_model, num_heads: as usual.
        num_kv_heads: key/value heads, a divisor of `num_heads`; None is `num_heads` (multi-head attention).
        head_dim: None is `d_model // num_heads`; free otherwise.
        d_ff: width of the feed-forward branch; None is `4 * d_model`.
        attention, mlp, norm, positions: see their types.
        local_positions: RoPE of the layers that have a sliding window, where it differs (Gemma 3).
        embedding_scale: multiplies the token embeddings (Gemma: `sqrt(d_model)`, rounded to `dtype`).
        tied: the head is the embedding table.
        logit_soft_cap: logits become `cap * tanh(logits / cap)` (Gemma 2).
        lora: adapters, the only parameters that are then trained; None trains all.
        dropout: rate on embeddings and on each branch's output, in training only.
        init_std: standard deviation of initial weights; output projections get `init_std / sqrt(2 num_layers)`.
        dtype: computation; norms, softmax, loss and sums over devices stay in at least float32. "bf16" and
            `jnp.bfloat16` are "bfloat16", and so are the others' like.
        param_dtype: storage.
        origin: what the folder of Hugging Face that it was read from said besides, as a JSON text, for `sl.save_hf` to
            write it again; it is no part of the model, and does not count where configurations are compared.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int = None  # pyright: ignore[reportAssignmentType]  filled in __post_init__
    head_dim: int = None  # pyright: ignore[reportAssignmentType]
    d_ff: int = None  # pyright: ignore[reportAssignmentType]
    attention: Attention = field(default_factory=Attention)
    mlp: MLP = field(default_factory=MLP)
    norm: Norm = field(default_factory=Norm)
    positions: Rope | LearnedPositions = field(default_factory=Rope)
    local_positions: Rope | None = None
    embedding_scale: float | None = None
    tied: bool = False
    logit_soft_cap: float | None = None
    lora: Lora | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    vocab_multiple: int = 128
    origin: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        problems = [
            f"{name}={value!r}; it is a positive integer"
            for name in ("vocab_size", "num_layers", "d_model", "num_heads", "vocab_multiple")
            if not _positive(value := getattr(self, name))
        ]
        _raise("TransformerConfig", problems)
        divides = self.head_dim is not None or self.d_model % self.num_heads == 0
        if not divides:
            problems.append(
                f"head_dim is not given and d_model={self.d_model} does not divide by num_heads={self.num_heads}: "
                "give head_dim, or change one of them"
            )
        defaults = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.d_model // self.num_heads,
            "d_ff": 4 * self.d_model,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif not _positive(getattr(self, name)):
                problems.append(f"{name}={getattr(self, name)!r}; it is a positive integer, or None for {default}")
        if _positive(self.num_kv_heads) and self.num_heads % self.num_kv_heads:
            legal = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            problems.append(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: use {legal}")
        if isinstance(self.positions, Rope) and _positive(self.head_dim) and self.head_dim % 2 and divides:
            problems.append(f"head_dim={self.head_dim} is odd, and RoPE rotates pairs: make it even")
        if self.local_positions is not None and not isinstance(self.positions, Rope):
            problems.append("local_positions needs RoPE in positions too")
        if self.local_positions is not None and set(self.attention.windows) == {None}:
            problems.append("local_positions is for layers with a sliding window, and attention.windows has none")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout={self.dropout}; it is at least 0 and below 1")
        problems += _not_positive(self, "embedding_scale", "logit_soft_cap", or_none=True)
        if self.lora is not None and not self.mlp.gated and "gate" in self.lora.targets:
            problems.append("lora.targets has 'gate', and mlp.gated=False has none: leave it out")
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, full_name(getattr(self, name)))
            if getattr(self, name) not in FLOATS:
                problems.append(f"{name}={getattr(self, name)!r}; it is one of {', '.join(FLOATS)}")
        if not isinstance(self.origin, str | None):
            problems.append(f"origin is {type(self.origin).__name__}; it is a text, or None")
        _raise("TransformerConfig", problems)

    def lora_of(self, target: str) -> Lora | None:
        """The adapters of a projection, None where it has none."""
        return self.lora if self.lora is not None and target in self.lora.targets else None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, in tokens; None attends to everything before."""
        pattern = self.attention.windows
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

    @property
    def max_sequence(self) -> int | None:
        """The longest sequence the model can take; None where its positions set no limit."""
        return self.positions.length if isinstance(self.positions, LearnedPositions) else None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, its parts tagged with their type's name."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: a name that is no field, or no part's type.
        """
        try:
            config = _from_dict(values)
        except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"these values are not those of a configuration: {error}") from error
        if not isinstance(config, cls):
            raise ValueError(f"these values describe a {type(config).__name__}, not a TransformerConfig")
        return config


_PARTS = {
    t.__name__: t
    for t in (TransformerConfig, Norm, Rope, LinearScaling, Llama3Scaling, LearnedPositions, Attention, MLP, Lora)
}


def _to_dict(part: Any) -> Any:
    if type(part).__name__ not in _PARTS:
        return list(part) if isinstance(part, tuple) else part
    values = {f.name: _to_dict(getattr(part, f.name)) for f in fields(part)}
    if values.get("origin", "") is None:  # of most, and versions before it do not know the name
        del values["origin"]
    return {"type": type(part).__name__} | values


def _from_dict(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    values = dict(value)
    part = _PARTS.get(values.pop("type", None))
    unknown = set(values) - {f.name for f in fields(part)} if part else {value.get("type")}
    if unknown or part is None:
        raise ValueError(f"a configuration written by another version: unknown {sorted(map(str, unknown))}")
    return part(**{name: _from_dict(inner) for name, inner in values.items()})


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _not_positive(part: Any, *names: str, or_none: bool = False) -> list[str]:
    """A problem for each of these fields that is not a positive number."""
    values = {name: getattr(part, name) for name in names}
    wrong = {n: v for n, v in values.items() if not (isinstance(v, int | float) and v > 0 or or_none and v is None)}
    return [f"{name}={value!r}; it is positive{', or None' * or_none}" for name, value in wrong.items()]


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))
