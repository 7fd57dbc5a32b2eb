"""The table from logical dims to mesh axes is strict: what it does not know, or cannot split evenly, is an error."""

import pytest
from jax.sharding import PartitionSpec as P

from shardlm.dims import DimTable
from shardlm.layout import Layout, LayoutError


def table(kv_heads: int | None = None, **sizes) -> DimTable:
    return DimTable.of(Layout(**sizes), kv_heads)


def test_specs_name_only_axes_of_more_than_one_device():
    split = table(data=2).split("w", (8, 6), ("embed", "mlp"))
    assert split.whole == split.sharded == split.stored == P()
    assert table(tensor=2).split("w", (8, 6), ("embed", "mlp")).stored == P(None, "tensor")


def test_zero_takes_the_embed_dim_and_stores_what_its_level_says():
    for zero, stored in ((1, P(None, "tensor")), (2, P(None, "tensor")), (3, P("fsdp", "tensor"))):
        split = table(fsdp=2, tensor=3, zero=zero).split("w", (8, 6), ("embed", "mlp"))
        assert split.sharded == P("fsdp", "tensor")
        assert split.whole == P(None, "tensor")
        assert split.stored == stored
        assert split.zero_dim == 0


def test_without_an_embed_dim_zero_takes_the_largest_that_divides():
    assert table(fsdp=2).split("b", (3, 6, 8), ("layer", "head", "head_dim")).sharded == P(None, None, "fsdp")
    assert table(fsdp=3).split("b", (3, 6, 8), ("layer", "head", "head_dim")).sharded == P(None, "fsdp")
    # Split over tensor already, and further over fsdp: the shards of a tensor shard lie within it.
    assert table(fsdp=2, tensor=2).split("b", (3, 12), ("layer", "mlp")).sharded == P(None, ("tensor", "fsdp"))


def test_what_no_dim_divides_stays_whole():
    split = table(fsdp=4).split("b", (4, 6), ("layer", "head_dim"))  # never the layer dim, which is scanned over
    assert split.sharded == P()
    assert split.zero_axes == ()


def test_fewer_kv_heads_than_devices_are_not_split():
    assert table(2, tensor=4).split("k", (8, 2, 4), ("embed", "kv_head", "head_dim")).whole == P()
    assert table(4, tensor=4).split("k", (8, 4, 4), ("embed", "kv_head", "head_dim")).whole == P(None, "tensor")
    assert table(8, tensor=4).split("k", (8, 8, 4), ("embed", "kv_head", "head_dim")).whole == P(None, "tensor")


def test_activations():
    assert table(data=2, fsdp=2).activation("batch", "sequence") == P(("data", "fsdp"))
    assert table(tensor=2).activation("batch", "sequence") == P()


@pytest.mark.parametrize(
    ("shape", "dims", "message"),
    [
        ((8, 6), ("embed", "mpl"), r"parameter 'w' of shape \(8, 6\).*unknown dim 'mpl'.*layer, vocab, embed"),
        ((8, 6), ("embed", "batch"), "unknown dim 'batch'"),
        ((8, 6), ("embed",), "2 dims of the array, 1 names"),
        ((8, 6), ("head", "mlp"), "two of its dims over the axis 'tensor': head -> tensor, mlp -> tensor"),
        ((8, 7), ("embed", "mlp"), "mlp=7 does not divide over tensor=2"),
    ],
)
def test_mistakes_name_the_parameter_and_the_rule(shape, dims, message):
    with pytest.raises(LayoutError, match=message):
        table(tensor=2).split("w", shape, dims)


def test_a_rule_that_splits_nothing_is_an_error():
    parameters = {"a": {"scale": ((8,), ("embed",))}}
    assert table(fsdp=2).splits(parameters)["a"]["scale"].path == "a/scale"
    with pytest.raises(LayoutError, match="axis tensor=2 splits the dims .*'vocab', 'head'.*use tensor=1"):
        table(tensor=2).splits(parameters)


def test_it_prints_every_rule():
    text = str(table(2, data=2, fsdp=2, tensor=4))
    assert "batch     -> data=2 x fsdp=2" in text
    assert "kv_head   -> (whole)" in text
    assert "vocab     -> tensor=4" in text
    assert "ZeRO-3    -> fsdp=2" in text
