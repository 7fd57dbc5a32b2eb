"""FLOPs counted in the traced step against closed forms, and against what is known of single operations."""

import jax
import jax.numpy as jnp
import pytest

import shardlm as sl
from shardlm.inspect import flops

B, S = 8, 64


def report(layout: str, **changes) -> sl.Report:
    config = sl.TransformerConfig(**{"vocab_size": 512, "num_layers": 3, "d_model": 64, "num_heads": 4, **changes})
    parsed = sl.Layout.parse(layout)
    return sl.Trainer(config, parsed, devices=parsed.num_devices).explain(batch_size=B, sequence=S)


@pytest.mark.parametrize(("layers", "width", "vocabulary"), [(3, 64, 512), (5, 96, 1024), (2, 256, 128)])
@pytest.mark.parametrize("layout", ["data=1", "data=2,fsdp=2,tensor=2", "tensor=4,sequence_parallel,accumulate=2"])
def test_a_step_is_the_closed_form_of_the_megatron_paper(layout, layers, width, vocabulary):
    """arXiv:2104.04473 equation 3, for a plain MLP of 4 h and multi-head attention, without and with recomputation.

    72 B s l h^2 (1 + s/6h + V/12lh) without; its 96 B s l h^2 (1 + s/6h + V/16lh) makes every layer's forward again.
    JAX leaves out of that the second product of the MLP, 8 B s h^2 a layer, whose result nobody needs.
    """
    sizes = {"num_layers": layers, "d_model": width, "vocab_size": vocabulary, "d_ff": 4 * width}
    plain = sl.MLP(gated=False)
    h, v = width, vocabulary
    model = 72 * B * S * layers * h**2 * (1 + S / (6 * h) + v / (12 * layers * h))
    found = report(layout, mlp=plain, **sizes)
    assert found.flops.model * found.num_devices == pytest.approx(model, rel=1e-3)
    assert found.flops.recomputed == 0
    full = report(f"{layout},remat=full", mlp=plain, **sizes)
    paper = 96 * B * S * layers * h**2 * (1 + S / (6 * h) + v / (16 * layers * h))
    assert full.flops.total * full.num_devices == pytest.approx(paper - 8 * B * S * layers * h**2, rel=1e-3)
    assert full.flops.model == found.flops.model


def test_grouped_heads_and_gated_mlp_are_counted_as_they_are():
    found = report("data=1", num_kv_heads=2, d_ff=160)
    d, kv, ff = 64, 2 * 16, 160
    per_token = 2 * (2 * d * d + 2 * d * kv + 3 * d * ff) * 3 + 2 * 2 * S * d * 3 + 2 * d * 512
    assert found.flops.forward == B * S * per_token
    assert found.flops.backward == 2 * found.flops.forward


def test_chunked_attention_makes_its_scores_again_and_nothing_else():
    plain = report("data=1")
    chunked = report("data=1", attention=sl.Attention(implementation="chunked"))
    assert chunked.flops.model == plain.flops.model
    assert chunked.flops.recomputed == 3 * 2 * B * S * S * 64


def test_products_and_convolutions():
    def count(function, *shapes):
        return sl.inspect.count_flops(function, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).forward

    assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 5), (2, 5, 7)) == 2 * 2 * 3 * 5 * 7
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count(conv, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)
    assert count(lambda a: jnp.sin(a).sum(), (3, 5)) == 0


def test_global_work_is_shared_and_a_while_loop_says_so():
    looped = jax.make_jaxpr(lambda a: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, a))(jnp.zeros((4, 4)))
    assert flops.of(looped, 2) == flops.Flops(forward=2 * 64 / 2, endless=True)


def test_muons_products_are_the_updates():
    import optax

    config = sl.TransformerConfig(vocab_size=32, num_layers=2, d_model=16, num_heads=2)
    trainer = sl.Trainer(config, sl.Layout(), optax.contrib.muon(1e-3), devices=1)
    found = trainer.explain(batch_size=2, sequence=8).flops
    assert found.update > 0
    assert sl.Trainer(config, devices=1).explain(batch_size=2, sequence=8).flops.update == 0
