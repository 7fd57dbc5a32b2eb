"""Attention equals a softmax written as loops, for every way of hiding keys and of sharing them between heads."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardlm as sl
from shardlm.models import attention
from shardlm.models.attention import SelfAttention, Visibility, attend, attend_chunked, attend_cudnn
from shardlm.models.rope import frequencies, rotations

BATCH, SEQUENCE, HEADS, HEAD_DIM = 2, 5, 6, 4
# The second row comes back to its first segment, which nobody promised not to happen.
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 3, 1, 3, 0]])
SCALE = 0.7
WIDE = {"dtype": "float64", "param_dtype": "float64"}
CASES = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "segments": {"segments": SEGMENTS},
    "segments in a window": {"segments": SEGMENTS, "window": 2},
    "soft cap": {"soft_cap": 1.5},
    "all": {"segments": SEGMENTS, "window": 2, "soft_cap": 1.5},
}


def sees(query, key, segments, window):
    """Whether the query's token sees the key's, in one row."""
    same = segments is None or segments[query] == segments[key]
    return key <= query and same and (window is None or query - key < window)


def reference(q, k, v, segments=None, window=None, soft_cap=None, scale=SCALE):
    """softmax(scale q k^T) v by loops, in float64: query head h reads key/value head h // group."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(q.shape[:3]):
        keys = [j for j in range(SEQUENCE) if sees(i, j, None if segments is None else segments[b], window)]
        scores = [scale * float(q[b, h, i] @ k[b, h // group, j]) for j in keys]
        if soft_cap is not None:
            scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
        weights = [math.exp(score - max(scores)) for score in scores]
        out[b, h, i] = sum(w * v[b, h // group, j] for w, j in zip(weights, keys, strict=True)) / sum(weights)
    return out


def visibility(segments=None, window=None):
    return Visibility(jnp.arange(SEQUENCE), None if segments is None else jnp.asarray(segments), window)


def sample(kv_heads):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, heads, SEQUENCE, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [rng.normal(size=shape) for shape in shapes]


def run(q, k, v, segments=None, window=None, soft_cap=None, dtype="float64"):
    @jax.jit
    def attention(q, k, v):
        return attend(q, k, v, visibility(segments, window), SCALE, soft_cap)

    return attention(*(jnp.asarray(x, dtype) for x in (q, k, v)))


@pytest.mark.parametrize(
    ("case", "kv_heads"), [*((case, 2) for case in CASES), ("plain", 1), ("plain", 6), ("all", 1), ("all", 6)]
)
def test_attention_is_a_softmax_over_the_keys_seen(case, kv_heads, x64):
    q, k, v = sample(kv_heads)
    got = run(q, k, v, **CASES[case])
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, reference(q, k, v, **CASES[case]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 512])
@pytest.mark.parametrize("case", CASES)
def test_queries_in_chunks_give_the_same(case, chunk, x64, monkeypatch):
    """Values and gradients, chunks that divide the sequence and chunks that do not."""
    monkeypatch.setattr(attention, "CHUNK", chunk)
    options = {"soft_cap": CASES[case].get("soft_cap")}
    visible = visibility(CASES[case].get("segments"), CASES[case].get("window"))
    arrays = [jnp.asarray(x) for x in sample(2)]
    target = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape))

    def both(function):
        loss = lambda *qkv: (function(*qkv, visible, SCALE, **options) * target).sum()  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)

    for a, b in zip(jax.tree.leaves(both(attend)), jax.tree.leaves(both(attend_chunked)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-13 * float(jnp.abs(a).max()))


def test_no_case_passes_for_another():
    """The negative control: every way of hiding keys gives other numbers, and so does the other order of heads."""
    q, k, v = sample(2)
    results = [reference(q, k, v, **case) for case in CASES.values()]
    interleaved = np.arange(HEADS).reshape(3, 2).T.ravel()  # query head h reads key/value head h % 2
    results.append(reference(q, *(x[:, np.arange(HEADS) % 2] for x in (k, v))))
    results.append(reference(q[:, interleaved], k, v))
    for i, first in enumerate(results):
        for second in results[:i]:
            assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole row", "segments"])
def test_the_mask_by_loops(segments, window):
    mask = visibility(segments, window).mask()
    rows = 1 if segments is None else BATCH
    assert mask.dtype == bool and mask.shape == (rows, 1, SEQUENCE, SEQUENCE)
    for b, _, i, j in np.ndindex(mask.shape):
        assert mask[b, 0, i, j] == sees(i, j, None if segments is None else segments[b], window)
    np.testing.assert_array_equal(visibility(segments, None if window is None else jnp.int32(window)).mask(), mask)


def test_a_window_as_long_as_the_sequence_hides_nothing():
    q, k, v = sample(2)
    np.testing.assert_array_equal(run(q, k, v, window=SEQUENCE, dtype="float32"), run(q, k, v, dtype="float32"))
    assert (run(q, k, v, window=SEQUENCE - 1, dtype="float32") != run(q, k, v, dtype="float32")).any()


def test_hidden_keys_have_no_weight_at_all():
    q, k, v = sample(2)
    hidden = v.copy()
    hidden[0, :, :2] = 1e30  # the first segment of the first row
    got, want = (run(q, k, x, segments=SEGMENTS, dtype="float32") for x in (hidden, v))
    np.testing.assert_array_equal(got[0, :, 2:], want[0, :, 2:])
    assert (np.abs(got[0, :, :2]) > 1e29).any()


def test_scores_of_bfloat16_are_summed_and_normalised_in_float32():
    q, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in sample(2))
    got = run(8 * q, k, v, dtype="bfloat16")  # scores near 50, where bfloat16 counts in steps of 0.25
    assert got.dtype == jnp.bfloat16
    want = reference(8 * q, k, v)
    # Weights and result are rounded to 8 bits once each.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2.0**-8 * np.abs(v).max())


@pytest.mark.parametrize(
    "case",
    [{}, {"window": 3}, {"window": jnp.int32(3)}, {"segments": SEGMENTS}, {"segments": SEGMENTS, "window": 3}],
    ids=["plain", "window", "window of a scan", "segments", "segments in a window"],
)
def test_the_fused_kernel_is_asked_for_the_same_attention(case, monkeypatch):
    kernel = jax.nn.dot_product_attention
    asked = []

    def on_cpu(*arrays, implementation, **options):
        asked.append((implementation, options["mask"] is not None))
        return kernel(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in sample(2))
    got = attend_cudnn(q, k, v, visibility(**case), SCALE)
    np.testing.assert_allclose(got, attend(q, k, v, visibility(**case), SCALE, None), atol=1e-6)
    # A mask costs memory of the square of the sequence: only where the kernel cannot know what is hidden.
    assert asked == [("cudnn", "segments" in case or isinstance(case.get("window"), jax.Array))]


# The layer


def perturbed(build):
    """What `build` makes, with every parameter random, since biases start at zero and norms at one; and these."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(build))
    drawn = jax.tree.map(lambda p: jnp.asarray(0.7 * rng.normal(size=p.shape), p.dtype), nnx.to_pure_dict(state))
    return nnx.merge(graph, nnx.State(drawn)), jax.tree.map(lambda p: np.asarray(p, np.float64), drawn)


def config(num_kv_heads=2, epsilon=1e-6, one_plus_scale=False, **attention):
    return sl.TransformerConfig(
        vocab_size=67, num_layers=3, d_model=7, num_heads=HEADS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM,
        attention=sl.Attention(**attention), norm=sl.Norm(epsilon=epsilon, one_plus_scale=one_plus_scale), **WIDE,
    )  # fmt: skip


def layer_reference(c, p, x, rope, segments=None):
    """The whole layer in NumPy: p is its parameters, `rope` None or the positions' settings."""

    def heads(name, norm):
        y = np.stack([x @ p[name]["kernel"][:, h] for h in range(p[name]["kernel"].shape[1])], axis=1)
        y = y + p[name]["bias"][None, :, None] if "bias" in p[name] else y
        if norm in p:
            scale = p[norm]["scale"] + 1 if c.norm.one_plus_scale else p[norm]["scale"]
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm.epsilon) * scale
        if rope is not None and name != "value":
            z = y[..., : HEAD_DIM // 2] + 1j * y[..., HEAD_DIM // 2 :]
            z = z * np.exp(1j * np.outer(np.arange(SEQUENCE), frequencies(rope, HEAD_DIM)))
            y = np.concatenate([z.real, z.imag], axis=-1)
        return y

    q, k, v = heads("query", "query_norm"), heads("key", "key_norm"), heads("value", "none")
    scale = 1 / math.sqrt(HEAD_DIM) if c.attention.scale is None else c.attention.scale
    o = reference(q, k, v, segments, c.attention.windows[0], c.attention.soft_cap, scale)
    y = sum(o[:, h] @ p["output"]["kernel"][h] for h in range(HEADS))
    return y + p["output"]["bias"] if "bias" in p["output"] else y


def run_layer(c, rope, x, segments=None):
    """The layer with every parameter random, applied to x; and its parameters."""
    module, p = perturbed(lambda: SelfAttention(c, rngs=nnx.Rngs(0)))

    @jax.jit
    def apply(x):
        rotation = None if rope is None else rotations(rope, HEAD_DIM, jnp.arange(SEQUENCE)[None], jnp.float64)
        return module(x, visibility(segments, c.attention.windows[0]), rotation)

    return np.asarray(apply(jnp.asarray(x))), p


FULL = dict(bias=True, output_bias=True, qk_norm=True, scale=0.9, soft_cap=2.0, windows=(3,))
LAYERS = {
    "llama": (config(), sl.Rope()),
    "multi-head without positions": (config(num_kv_heads=HEADS), None),
    "qwen 2": (config(bias=True), sl.Rope()),
    "qwen 3": (config(qk_norm=True, epsilon=0.1), sl.Rope()),
    "gpt-2": (config(num_kv_heads=HEADS, bias=True, output_bias=True), None),
    "all": (config(num_kv_heads=3, epsilon=0.1, one_plus_scale=True, **FULL), sl.Rope(theta=50.0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_its_formula(name, x64):
    c, rope = LAYERS[name]
    x = np.random.default_rng(1).normal(size=(BATCH, SEQUENCE, 7))
    segments = SEGMENTS if name == "all" else None
    got, p = run_layer(c, rope, x, segments)
    np.testing.assert_allclose(got, layer_reference(c, p, x, rope, segments), rtol=1e-11, atol=1e-11)


def test_every_setting_of_the_layer_changes_the_result(x64):
    """The negative control: the layer with one setting taken away is not the layer."""
    c, rope = LAYERS["all"]
    x = np.random.default_rng(1).normal(size=(BATCH, SEQUENCE, 7))
    got, p = run_layer(c, rope, x)

    def differs(c, p, rope):
        return np.abs(got - layer_reference(c, p, x, rope)).max() > 1e-4

    def without(name, leaf):
        return {key: {k: v for k, v in part.items() if (key, k) != (name, leaf)} for key, part in p.items()}

    assert not differs(c, p, rope)
    for plain in ({"scale": None}, {"soft_cap": None}, {"windows": (4,)}):
        assert differs(dataclasses.replace(c, attention=dataclasses.replace(c.attention, **plain)), p, rope)
    assert differs(dataclasses.replace(c, norm=sl.Norm(epsilon=0.1)), p, rope)
    assert differs(c, p, sl.Rope())
    for name in ("query", "value", "output"):
        assert differs(c, without(name, "bias"), rope)
    for name in ("query_norm", "key_norm"):
        assert differs(c, {key: part for key, part in p.items() if key != name}, rope)


def dims_of(c):
    """Of each parameter by its path, its shape and the names of its dims."""
    state = nnx.state(nnx.eval_shape(lambda: SelfAttention(c, rngs=nnx.Rngs(0))))
    return {
        "/".join(map(str, path)): (variable.get_value().shape, variable.get_metadata()["out_sharding"])
        for path, variable in nnx.to_flat_state(state)
    }


def test_dims_are_named_by_meaning(x64):
    named = dims_of(config(bias=True, output_bias=True, qk_norm=True))
    inward = {
        name: ((7, heads, 4), ("embed", dim, "head_dim"))
        for name, heads, dim in (("query", 6, "head"), ("key", 2, "kv_head"), ("value", 2, "kv_head"))
    }
    want = {f"{name}/kernel": value for name, value in inward.items()}
    want |= {f"{name}/bias": (shape[1:], dims[1:]) for name, (shape, dims) in inward.items()}
    want |= {"output/kernel": ((6, 4, 7), ("head", "head_dim", "embed")), "output/bias": ((7,), ("embed",))}
    want |= {f"{name}/scale": ((4,), ("head_dim",)) for name in ("query_norm", "key_norm")}
    assert named == want


def test_what_is_not_asked_for_is_not_there(x64):
    kernels = {f"{name}/kernel" for name in ("query", "key", "value", "output")}
    assert set(dims_of(config())) == kernels
    assert set(dims_of(config(bias=True))) == kernels | {"query/bias", "key/bias", "value/bias"}
    assert set(dims_of(config(output_bias=True))) == kernels | {"output/bias"}
    assert set(dims_of(config(qk_norm=True))) == kernels | {"query_norm/scale", "key_norm/scale"}
