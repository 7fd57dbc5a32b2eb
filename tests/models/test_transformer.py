"""The whole model equals one written in NumPy for each family's settings, and keeps what a decoder promises."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardlm as sl
from shardlm.models.attention import Visibility
from shardlm.models.dropout import Dropout
from shardlm.models.rope import frequencies, rotations
from shardlm.models.stack import Execution
from shardlm.models.transformer import Transformer, count_parameters, parameter_dims
from shardlm.parallel import remat

VOCAB, LAYERS, BATCH, SEQUENCE = 67, 3, 2, 7
BASE = sl.TransformerConfig(
    vocab_size=VOCAB, num_layers=LAYERS, d_model=10, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=14,
    norm=sl.Norm(epsilon=0.1), vocab_multiple=16, dtype="float64", param_dtype="float64",
)  # fmt: skip
GEMMA = dataclasses.replace(
    BASE, tied=True, embedding_scale=10**0.5, mlp=sl.MLP(activation="gelu_tanh"),
    norm=sl.Norm(epsilon=0.1, one_plus_scale=True, after=True),
)  # fmt: skip
FAMILIES = {
    "llama": dataclasses.replace(BASE, positions=sl.Rope(theta=50.0, scaling=sl.Llama3Scaling(original_length=16))),
    "mistral": dataclasses.replace(BASE, attention=sl.Attention(windows=(3,))),
    "qwen": dataclasses.replace(BASE, attention=sl.Attention(bias=True, qk_norm=True), tied=True),
    "gemma 2": dataclasses.replace(
        GEMMA, attention=sl.Attention(scale=0.5, soft_cap=1.5, windows=(3, None)), logit_soft_cap=2.0
    ),
    "gemma 3": dataclasses.replace(
        GEMMA, attention=sl.Attention(qk_norm=True, windows=(3, 2, None)), local_positions=sl.Rope(theta=20.0),
        positions=sl.Rope(theta=100.0, scaling=sl.LinearScaling(factor=8.0)),
    ),
    "gpt-2": dataclasses.replace(
        BASE, tied=True, num_kv_heads=4, attention=sl.Attention(bias=True, output_bias=True),
        mlp=sl.MLP(gated=False, activation="gelu", bias=True), norm=sl.Norm(kind="layer", epsilon=0.1),
        positions=sl.LearnedPositions(length=SEQUENCE),
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (BATCH, SEQUENCE))
SEGMENTS = np.array([[1, 1, 1, 2, 3, 3, 3], [1, 1, 2, 2, 2, 2, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 0, 1, 2], [0, 1, 0, 1, 2, 3, 0]])


# The reference: one row, a loop over layers, heads and queries


def reference(c, p, dropout=lambda b, y, layer, site: y):
    """Logits of TOKENS, packed as SEGMENTS and POSITIONS say."""
    rows = zip(TOKENS, SEGMENTS, POSITIONS, strict=True)
    return np.stack([reference_row(c, p, *row, functools.partial(dropout, b)) for b, row in enumerate(rows)])


def reference_row(c, p, tokens, segments, positions, dropout):
    x = p["embedding"]["table"][tokens] * (1 if c.embedding_scale is None else c.embedding_scale)
    if isinstance(c.positions, sl.LearnedPositions):
        x = x + p["positions"]["table"][positions]
    x = dropout(x, c.num_layers, 2)
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        window = c.attention.windows[i % len(c.attention.windows)]
        rope = c.local_positions if window is not None and c.local_positions is not None else c.positions
        y = reference_attention(
            c, layer["attention"], normed(c, layer["attention_norm"], x), window, rope, segments, positions
        )
        x = x + dropout(normed(c, layer["attention_after_norm"], y) if c.norm.after else y, i, 0)
        y = reference_mlp(c, layer["mlp"], normed(c, layer["mlp_norm"], x))
        x = x + dropout(normed(c, layer["mlp_after_norm"], y) if c.norm.after else y, i, 1)
    z = normed(c, p["final_norm"], x) @ p["embedding" if c.tied else "head"]["table"][:VOCAB].T
    return z if c.logit_soft_cap is None else c.logit_soft_cap * np.tanh(z / c.logit_soft_cap)


def normed(c, p, x, kind=None):
    if (kind or c.norm.kind) == "layer":
        x = x - x.mean(-1, keepdims=True)
    scale = 1 + p["scale"] if c.norm.one_plus_scale else p["scale"]
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm.epsilon) * scale + p.get("bias", 0.0)


def reference_attention(c, p, x, window, rope, segments, positions):
    def head(name, h):
        y = x @ p[name]["kernel"][:, h] + (p[name]["bias"][h] if c.attention.bias else 0.0)
        if name == "value":
            return y
        y = normed(c, p[f"{name}_norm"], y, "rms") if c.attention.qk_norm else y
        if isinstance(rope, sl.LearnedPositions):
            return y
        half = c.head_dim // 2
        z = (y[:, :half] + 1j * y[:, half:]) * np.exp(1j * np.outer(positions, frequencies(rope, c.head_dim)))
        return np.concatenate([z.real, z.imag], axis=-1)

    scale = 1 / math.sqrt(c.head_dim) if c.attention.scale is None else c.attention.scale
    y = np.zeros_like(x)
    for h in range(c.num_heads):
        kv = h // (c.num_heads // c.num_kv_heads)
        q, k, v = head("query", h), head("key", kv), head("value", kv)
        for i in range(len(x)):
            first = 0 if window is None else max(0, i - window + 1)
            seen = [j for j in range(first, i + 1) if segments[j] == segments[i]]
            scores = scale * k[seen] @ q[i]
            if c.attention.soft_cap is not None:
                scores = c.attention.soft_cap * np.tanh(scores / c.attention.soft_cap)
            weights = np.exp(scores - scores.max())
            y[i] += (weights / weights.sum()) @ v[seen] @ p["output"]["kernel"][h]
    return y + (p["output"]["bias"] if c.attention.output_bias else 0.0)


def reference_mlp(c, p, x):
    activation = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "gelu": lambda v: v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    }[c.mlp.activation]
    line = lambda name, x: x @ p[name]["kernel"] + (p[name]["bias"] if c.mlp.bias else 0.0)  # noqa: E731
    return line("down", activation(line("gate", x)) * line("up", x) if c.mlp.gated else activation(line("up", x)))


# The model, every parameter random: at initial values a norm's scale or a bias that is left out does not show


def random_parameters(c, seed=0):
    rng = np.random.default_rng(seed)
    _, shapes, _ = parameter_dims(c)
    return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), shapes)


def model_of(c, parameters):
    graph, _, _ = parameter_dims(c)
    return nnx.merge(graph, nnx.State(parameters))


@functools.cache
def compiled(c):
    return jax.jit(lambda parameters, *args, **named: model_of(c, parameters)(*args, **named))


def logits(name, tokens=TOKENS, **named):
    """The family's logits in float64; one compilation a family, as long as shapes stay the same."""
    c = FAMILIES[name]
    return np.asarray(compiled(c)(random_parameters(c), jnp.asarray(tokens), **jax.tree.map(jnp.asarray, named)))


def packed(name, **named):
    return logits(name, segments=SEGMENTS, positions=POSITIONS, **named)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_the_one_in_numpy(name, x64):
    c, p = FAMILIES[name], jax.tree.map(np.asarray, random_parameters(FAMILIES[name]))
    got = packed(name)
    assert got.shape == (BATCH, SEQUENCE, VOCAB) and got.dtype == np.float64
    np.testing.assert_allclose(got, reference(c, p), rtol=1e-10, atol=1e-11)


def test_every_setting_changes_the_logits(x64):
    """The negative control: the reference with one setting changed is not the model."""
    changes = {
        "llama": [{"positions": sl.Rope(theta=50.0)}, {"norm": sl.Norm(epsilon=0.11)}],
        "mistral": [{"attention": sl.Attention(windows=(4,))}, {"attention": sl.Attention()}],
        "qwen": [{"attention": sl.Attention(bias=True)}, {"attention": sl.Attention(qk_norm=True)}],
        "gemma 2": [
            {"attention": dataclasses.replace(FAMILIES["gemma 2"].attention, **change)}
            for change in ({"scale": None}, {"soft_cap": None}, {"windows": (None, 3)})
        ]
        + [{"logit_soft_cap": None}, {"embedding_scale": None}, {"norm": sl.Norm(epsilon=0.1, one_plus_scale=True)}],
        "gemma 3": [{"local_positions": None}, {"positions": sl.Rope(theta=100.0)}],
        "gpt-2": [{"norm": sl.Norm(epsilon=0.1)}, {"mlp": sl.MLP(gated=False, activation="gelu_tanh", bias=True)}],
    }
    for name, others in changes.items():
        got, p = packed(name), jax.tree.map(np.asarray, random_parameters(FAMILIES[name]))
        for other in others:
            c = dataclasses.replace(FAMILIES[name], **other)
            assert np.abs(got - reference(c, p)).max() > 1e-5, (name, other)


@pytest.mark.parametrize("name", ["gemma 3", "gpt-2"])
def test_without_segments_and_positions_a_row_is_one_document(name, x64):
    np.testing.assert_allclose(
        logits(name),
        logits(name, segments=np.ones_like(TOKENS), positions=np.tile(np.arange(SEQUENCE), (BATCH, 1))),
        rtol=1e-11, atol=1e-12,
    )  # fmt: skip
    assert np.abs(logits(name) - packed(name)).max() > 0.01


@pytest.mark.parametrize("name", ["gemma 3", "gpt-2"])
def test_a_packed_document_has_the_logits_it_has_alone(name, x64):
    together = packed(name)
    for row, first, last in [(0, 0, 3), (0, 3, 4), (0, 4, 7), (1, 0, 2), (1, 2, 6)]:
        # Alone in a row, and what follows it cannot matter: that keeps the shape, and so the program, the same.
        alone = np.zeros_like(TOKENS)
        alone[0, : last - first] = TOKENS[row, first:last]
        np.testing.assert_allclose(
            together[row, first:last], logits(name, alone)[0, : last - first], rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("name", ["llama", "gemma 3", "gpt-2"])
def test_a_later_token_changes_no_earlier_logit(name, x64):
    before = logits(name)
    for at in (1, 4, 6):
        changed = TOKENS.copy()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        after = logits(name, changed)
        np.testing.assert_array_equal(after[:, :at], before[:, :at])
        assert (np.abs(after[:, at:] - before[:, at:]).max(axis=(0, 2)) > 1e-6).all()


def test_a_token_reaches_as_far_as_its_windows_in_a_chain(x64):
    # Three layers of a window of 3 carry a token 2 + 2 + 2 positions on; with windows of 2, 1 and 3 it is 1 + 0 + 2.
    c = dataclasses.replace(BASE, attention=sl.Attention(windows=(2, 1, 3)))
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    before, after = (np.asarray(compiled(c)(random_parameters(c), jnp.asarray(t))) for t in (TOKENS, changed))
    np.testing.assert_array_equal(after[:, 4:], before[:, 4:])
    assert (np.abs(after[:, :4] - before[:, :4]).max(axis=(0, 2)) > 1e-6).all()


def test_the_scan_is_a_loop_over_the_blocks(x64):
    name = "gemma 3"
    c, parameters = FAMILIES[name], random_parameters(FAMILIES[name])

    @jax.jit
    def looped(parameters, tokens):
        model = model_of(c, parameters)
        graph, state = nnx.split(model.layers)
        x = model.embedding.table[...][tokens] * c.embedding_scale
        places = jnp.arange(SEQUENCE)
        for i, window in enumerate(c.windows):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            rope = c.positions if window is None else c.local_positions
            rotation = rotations(rope, c.head_dim, places[None], jnp.float64)
            x = block(x, Visibility(places, None, window), rotation, None, i)
        return model.logits(x)[..., :VOCAB]

    np.testing.assert_allclose(looped(parameters, jnp.asarray(TOKENS)), logits(name), rtol=1e-11, atol=1e-12)


def nll(model, hidden, tokens):
    """Of each next token, summed."""
    log_probabilities = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).sum()


@functools.cache
def gradient(execution="none"):
    """Of a tied model, whose table is both looked up and multiplied with."""
    c = FAMILIES["gemma 2"]

    @jax.jit
    @jax.grad
    def of(parameters):
        model, tokens = model_of(c, parameters), jnp.asarray(TOKENS)
        return nll(model, model.hidden(tokens, execution=Execution(remat=execution)), tokens)

    return of(random_parameters(c))


@pytest.mark.parametrize("execution", [name for name in remat.NAMES if name != "none"])
def test_rematerialisation_changes_no_gradient(execution, x64):
    got, want = gradient(execution), gradient()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max())
        assert np.abs(b).max() > 1e-6


def test_padding_of_the_vocabulary_has_no_gradient(x64):
    received = np.abs(gradient()["embedding"]["table"]).max(axis=-1) > 0
    np.testing.assert_array_equal(received, np.arange(80) < VOCAB)


def test_the_head_is_the_embedding_table_when_tied_and_its_own_otherwise(x64):
    tied = FAMILIES["qwen"]
    parameters = random_parameters(tied)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, SEQUENCE, tied.d_model)))
    want = model_of(tied, parameters).logits(hidden)

    def untied(head):
        return model_of(dataclasses.replace(tied, tied=False), parameters | {"head": {"table": head}}).logits(hidden)

    table = parameters["embedding"]["table"]
    np.testing.assert_array_equal(untied(table), want)
    assert (untied(table[::-1]) != want)[..., :VOCAB].all()


def test_an_id_outside_the_vocabulary_is_seen_in_its_row_and_in_no_other(x64):
    tokens = TOKENS.copy()
    tokens[1, 4] = VOCAB  # a row of the table, but of its padding
    got = logits("llama", tokens)
    assert np.isnan(got[1, 4:]).all()
    np.testing.assert_array_equal(got[0], logits("llama")[0])


def test_a_sequence_longer_than_the_learned_positions(x64):
    model = model_of(FAMILIES["gpt-2"], random_parameters(FAMILIES["gpt-2"]))
    with pytest.raises(ValueError, match="a sequence of 8 tokens is longer than the 7 learned positions"):
        model(jnp.zeros((1, 8), jnp.int32))


def test_a_position_outside_the_table_gives_nan(x64):
    positions = POSITIONS.copy()
    positions[0, 6], positions[1, 0] = SEQUENCE, -1
    got = logits("gpt-2", segments=SEGMENTS, positions=positions)
    assert np.isnan(got[0, 6]).all() and np.isnan(got[1, 0]).all()


def test_dropout_acts_on_the_embeddings_and_on_every_branch_by_a_mask_of_its_own(x64):
    c, p = FAMILIES["gpt-2"], jax.tree.map(np.asarray, random_parameters(FAMILIES["gpt-2"]))
    draws = Dropout(0.3, jax.random.key(0), jnp.arange(BATCH), jnp.arange(SEQUENCE))

    @functools.cache
    def mask(layer, site):
        return np.asarray(draws(jnp.ones((BATCH, SEQUENCE, c.d_model)), layer, site))

    got = packed("gpt-2", dropout=draws)
    want = reference(c, p, lambda b, y, layer, site: y * mask(layer, site)[b])
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)
    assert np.abs(got - packed("gpt-2")).max() > 0.01  # without the argument there is none


def test_a_row_takes_its_dropout_masks_along(x64):
    twice = [np.stack([array[0], array[0]]) for array in (TOKENS, SEGMENTS, POSITIONS)]

    def run(rows):
        draws = Dropout(0.3, jax.random.key(0), jnp.array(rows), jnp.arange(SEQUENCE))
        return logits("gpt-2", twice[0], segments=twice[1], positions=twice[2], dropout=draws)

    np.testing.assert_array_equal(run([5, 0]), run([0, 5])[::-1])
    assert (np.abs(np.subtract(*run([0, 5]))).max(axis=-1) > 0.01).all()


# Numbers and their types


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_bfloat16_computes_in_itself_but_normalises_in_float32_and_keeps_float32_parameters():
    c = dataclasses.replace(FAMILIES["gemma 3"], dtype="bfloat16", param_dtype="float32", logit_soft_cap=2.0)
    parameters = random_parameters(c)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}

    def loss(parameters):
        model = model_of(c, parameters)
        hidden = model.hidden(jnp.asarray(TOKENS))
        assert hidden.dtype == jnp.bfloat16
        assert model.logits(hidden).dtype == model(jnp.asarray(TOKENS)).dtype == jnp.float32
        return nll(model, hidden, jnp.asarray(TOKENS))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(parameters)
    assert {aval.dtype for aval in jaxpr.out_avals} == {jnp.dtype("float32")}
    used = {}
    for equation in equations(jaxpr.jaxpr):
        used.setdefault(equation.primitive.name, set()).update(str(v.aval.dtype) for v in equation.outvars)
    for operation in ("exp", "rsqrt", "cos", "sin", "log"):  # softmax, norms, rotations, loss
        assert used[operation] == {"float32"}, operation
    assert "bfloat16" in used["dot_general"]


def test_bfloat16_is_float32_to_three_digits():
    narrow = dataclasses.replace(FAMILIES["llama"], dtype="bfloat16", param_dtype="float32")
    wide = dataclasses.replace(narrow, dtype="float32")
    got, want = (np.asarray(compiled(c)(random_parameters(c), jnp.asarray(TOKENS))) for c in (narrow, wide))
    assert got.dtype == want.dtype == np.float32
    # Some twenty roundings of half a unit in 8 bits from embedding to logits, of independent sign.
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 1e-4 < error < math.sqrt(20) * 2.0**-8


# Construction


def test_layers_are_initialised_each_by_its_own_draw():
    c = dataclasses.replace(BASE, dtype="float32", param_dtype="float32", init_std=0.5)
    parameters = nnx.to_pure_dict(nnx.state(jax.jit(lambda: Transformer(c, rngs=nnx.Rngs(0)))()))
    kernel = np.asarray(parameters["layers"]["attention"]["query"]["kernel"])
    assert all((kernel[i] != kernel[j]).mean() > 0.99 for i in range(LAYERS) for j in range(i))
    assert (parameters["embedding"]["table"][:VOCAB] != parameters["head"]["table"][:VOCAB]).mean() > 0.99
    # A standard deviation estimated from n draws is off by 1/sqrt(2n) of itself: within five times that.
    for leaf, std in (
        (kernel, 0.5),
        (parameters["layers"]["attention"]["output"]["kernel"], 0.5 / math.sqrt(2 * LAYERS)),
    ):
        assert abs(float(leaf.std()) / std - 1) < 5 / math.sqrt(2 * leaf.size)


def test_parameters_are_described_without_being_made(x64):
    _, shapes, dims = parameter_dims(FAMILIES["gpt-2"])
    assert {type(leaf) for leaf in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    norm = {"scale": ((3, 10), ("layer", "embed")), "bias": ((3, 10), ("layer", "embed"))}
    inward = {
        dim: {
            "kernel": ((3, 10, 4, 6), ("layer", "embed", dim, "head_dim")),
            "bias": ((3, 4, 6), ("layer", dim, "head_dim")),
        }
        for dim in ("head", "kv_head")
    }
    assert dims == {
        "embedding": {"table": ((80, 10), ("vocab", "embed"))},
        "positions": {"table": ((7, 10), (None, "embed"))},
        "layers": {
            "attention_norm": norm,
            "attention": {
                "query": inward["head"],
                "key": inward["kv_head"],
                "value": inward["kv_head"],
                "output": {
                    "kernel": ((3, 4, 6, 10), ("layer", "head", "head_dim", "embed")),
                    "bias": ((3, 10), ("layer", "embed")),
                },
            },
            "mlp_norm": norm,
            "mlp": {
                "up": {"kernel": ((3, 10, 14), ("layer", "embed", "mlp")), "bias": ((3, 14), ("layer", "mlp"))},
                "down": {"kernel": ((3, 14, 10), ("layer", "mlp", "embed")), "bias": ((3, 10), ("layer", "embed"))},
            },
        },
        "final_norm": {"scale": ((10,), ("embed",)), "bias": ((10,), ("embed",))},
    }


def test_parameters_are_counted_without_the_padding(x64):
    attention = 2 * (10 * 4 * 6) + 2 * (10 * 2 * 6)
    llama = LAYERS * (attention + 3 * 10 * 14 + 2 * 10) + 10
    assert count_parameters(FAMILIES["llama"]) == llama + 2 * VOCAB * 10
    assert count_parameters(dataclasses.replace(FAMILIES["llama"], tied=True)) == llama + VOCAB * 10
    assert count_parameters(dataclasses.replace(FAMILIES["llama"], vocab_multiple=1)) == llama + 2 * VOCAB * 10
