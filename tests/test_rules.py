"""Rules, annotations and ZeRO decide every parameter's spec, and nothing that they cannot do passes in silence."""

import re
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm.rules import LARGE, flatten_parameters, split_annotated


def shape(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


SHAPES = {
    "embed": {"embedding": shape(66, 8)},
    "blocks": {
        str(i): {
            "attn": {"query": {"kernel": shape(8, 4, 2), "bias": shape(4, 2)}},
            "mlp": {"kernel": shape(8, 12), "bias": shape(12)},
            "norm": {"scale": shape(8)},
        }
        for i in range(2)
    },
    "steps": shape(3, dtype="bfloat16"),
}
RULES = [
    (r"embedding$", P("tensor")),
    (r"attn/query/kernel$", P(None, "tensor")),
    (r"mlp/kernel$", P("fsdp", "tensor")),
    (r"mlp/bias$", P("tensor")),
    (r".*", P()),
]
CUBE = sl.Layout(data=2, fsdp=2, tensor=2)


def specs(rules=RULES, layout=CUBE, which="stored", shapes=SHAPES, **options) -> dict[str, P]:
    table = sl.match_rules(shapes, rules, layout, **options)
    return {path: getattr(split, which) for path, split in table.splits.items()}


def conflicts(rules, layout=CUBE, shapes=SHAPES, **options) -> str:
    with pytest.raises(sl.LayoutError) as error:
        sl.match_rules(shapes, rules, layout, **options)
    return str(error.value)


def test_the_first_rule_decides_and_zero_takes_the_largest_free_dim_that_divides():
    block = {
        "attn/query/bias": P("fsdp"),
        "attn/query/kernel": P("fsdp", "tensor"),
        "mlp/bias": P("tensor"),  # its only dim has an axis already
        "mlp/kernel": P("fsdp", "tensor"),
        "norm/scale": P("fsdp"),
    }
    assert specs() == {
        "embed/embedding": P("tensor", "fsdp"),
        "steps": P(),  # 3 does not divide by 2
        **{f"blocks/{i}/{path}": spec for i in range(2) for path, spec in block.items()},
    }


@pytest.mark.parametrize("zero", [1, 2])
def test_below_level_3_only_the_optimizer_state_is_split_by_zero(zero: int):
    layout = sl.Layout(data=2, fsdp=2, tensor=2, zero=zero)
    assert specs(layout=layout, which="sharded") == specs()
    stored = specs(layout=layout)
    assert stored["embed/embedding"] == P("tensor")
    assert stored["blocks/0/mlp/kernel"] == P("fsdp", "tensor")  # as its rule says
    assert stored["blocks/1/norm/scale"] == P()


def test_axes_of_one_device_are_left_out_so_that_rules_serve_every_layout():
    assert set(specs(layout=sl.Layout(data=8)).values()) == {P()}
    assert specs(layout=sl.Layout(tensor=2))["blocks/0/mlp/kernel"] == P(None, "tensor")
    assert specs(layout=sl.Layout(fsdp=4))["embed/embedding"] == P(None, "fsdp")


def test_without_rules_zero_does_everything():
    found = specs(None, sl.Layout(fsdp=4))
    assert found["blocks/0/mlp/kernel"] == P(None, "fsdp")
    assert found["embed/embedding"] == P(None, "fsdp")  # 66 is larger and does not divide
    assert found["steps"] == P()


def test_annotations_of_a_flax_state_are_read():
    def make() -> nnx.Module:
        init = nnx.initializers.ones
        sharded = nnx.with_partitioning(init, (None, "tensor"))
        ruled = nnx.with_partitioning(init, ("in", "out"), sharding_rules=(("in", None), ("out", "tensor")))
        return nnx.Sequential(
            nnx.Linear(4, 6, kernel_init=sharded, rngs=nnx.Rngs(0)),
            nnx.Linear(6, 8, kernel_init=ruled, use_bias=False, rngs=nnx.Rngs(0)),
        )

    with nnx.use_eager_sharding(False):
        state = nnx.state(nnx.eval_shape(make), nnx.Param)
    table = sl.match_rules(state, None, CUBE)
    assert {path: split.stored for path, split in table.splits.items()} == {
        "layers/0/bias": P("fsdp"),
        "layers/0/kernel": P("fsdp", "tensor"),
        "layers/1/kernel": P("fsdp", "tensor"),
    }
    assert table.reasons["layers/0/kernel"] == "annotation, ZeRO-3 on dim 0"


def test_the_table_says_what_decided_and_what_a_device_holds():
    lines = str(sl.match_rules(SHAPES, RULES, CUBE)).splitlines()
    cells = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert cells["parameter"] == ["parameter", "shape", "dtype", "stored as", "bytes per device", "decided by"]
    assert cells["embed/embedding"][1:] == [
        "(66, 8)", "float32", "P('tensor', 'fsdp')", "528", "rule 0 ('embedding$', P('tensor')), ZeRO-3 on dim 1",
    ]  # fmt: skip
    assert cells["steps"][1:] == ["(3,)", "bfloat16", "P()", "6", "rule 4 ('.*', P())"]
    count = 66 * 8 + 3 + 2 * (64 + 8 + 96 + 12 + 8)
    held = 528 + 6 + 2 * 4 * (64 // 4 + 8 // 2 + 96 // 4 + 12 // 2 + 8 // 2)
    assert lines[-1] == f"{count} parameters of {4 * (count - 3) + 6:,} bytes, of which {held:,} on each device"
    table = sl.match_rules(SHAPES, RULES, sl.Layout(fsdp=2, zero=1))
    assert "optimizer state as" in str(table).splitlines()[0]
    assert "<td>blocks/0/mlp/kernel</td>" in table._repr_html_()


def test_parameters_without_a_rule_are_listed_with_rules_to_add():
    message = conflicts(RULES[:3])
    assert "no rule matches these 7 parameters, which have no annotation:" in message
    assert "blocks/1/mlp/bias (12,) float32, 48 bytes" in message
    assert "add rules, such as\n      (r\"^blocks/\\d+/attn/query/bias$\", P('tensor'))," in message
    assert 'or leave them all to ZeRO on purpose, by the last rule (r".*", P())' in message
    assert message.count("mlp/bias$") == 1  # one line for both blocks


def test_a_catch_all_is_not_proposed_where_it_would_contradict_an_annotation():
    message = conflicts(RULES[:3], annotations={"steps": P()})
    assert "no rule matches these 6" in message
    assert ".*" not in message


def test_following_the_suggestions_is_enough():
    message = conflicts([])
    added = [eval(line.strip().rstrip(","), {"P": P}) for line in message.splitlines() if line.strip().startswith("(r")]
    assert len(added) == 7
    assert specs(added)["blocks/1/mlp/kernel"] == P("fsdp", "tensor")


CLASHES = {
    "unused": (
        [*RULES[:4], (r"mpl/bias", P("tensor")), (r".*", P())],
        [r"rule 4 ('mpl/bias', P('tensor')) matches no parameter; paths are like 'blocks/1/mlp/bias'"],
    ),
    "shadowed": (
        [(r"mlp", P()), *RULES],
        [
            "rule 3 ('mlp/kernel$', P('fsdp', 'tensor')) decides nothing: all that it matches, blocks/0/mlp/kernel, "
            "blocks/1/mlp/kernel, is taken by rule 0 before it: move it up or delete it",
            "rule 4 ('mlp/bias$', P('tensor')) decides nothing",
        ],
    ),
    "unknown axis": (
        [(r"kernel$", P(None, "tensro")), (r".*", P("data"))],
        [
            "rule 0 ('kernel$', P(None, 'tensro')): 'tensro' is no mesh axis: did you mean 'tensor'? a parameter can "
            "be split over 'fsdp', 'tensor'",
            "rule 1 ('.*', P('data')): data splits the batch and nothing else: to split a parameter too, use fsdp",
        ],
    ),
    "axis twice": ([(r".*", P("tensor", "tensor"))], ["the axis 'tensor' is used 2 times; once is the most"]),
    "too many entries": (
        [(r"mlp", P(None, "tensor")), (r".*", P())],
        ["blocks/0/mlp/bias (12,): rule 0 ('mlp', P(None, 'tensor')) has 2 entries, for 1 dims"],
    ),
    "does not divide": (
        [(r"steps", P("tensor")), (r"mlp/bias", P(("fsdp", "tensor"))), (r".*", P())],
        [
            "steps (3,): rule 0 ('steps', P('tensor')): dim 0 of size 3 does not divide over tensor=2; "
            "it divides by 1, 3"
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASHES)
def test_rules_that_cannot_be_meant_are_listed(name: str):
    rules, expected = CLASHES[name]
    message = conflicts(rules)
    assert message.startswith("the parameters cannot be split as asked:\n  - ")
    for problem in expected:
        assert problem in message
    assert message.count("\n  - ") >= len(expected)


def test_a_rule_overrides_an_annotation_and_the_table_says_so():
    annotations = {"embed/embedding": P("tensor", None)}
    assert specs(annotations=annotations)["embed/embedding"] == P("tensor", "fsdp")
    for annotation in (P(None, "tensor"), P("vocab", "embed"), P("data"), P("tensor", "tensor")):
        table = sl.match_rules(SHAPES, RULES, CUBE, {"embed/embedding": annotation})
        assert table.splits["embed/embedding"].stored == P("tensor", "fsdp")
        over = f"rule 0 ('embedding$', P('tensor')), over the annotation P({', '.join(map(repr, annotation))})"
        assert table.reasons["embed/embedding"].startswith(over)


def test_annotations_with_unknown_axes_are_an_error():
    message = conflicts(None, annotations={"embed/embedding": P("vocab", "embed"), "steps": P("tensor")})
    assert "the annotation P('vocab', 'embed') of embed/embedding: 'vocab' is no mesh axis" in message
    assert "'tensro' is no mesh axis: did you mean 'tensor'?" in conflicts(None, annotations={"steps": P("tensro")})


def test_logical_names_are_one_short_error_whose_fix_is_enough():
    leaves = flatten_parameters(SHAPES)[0]
    annotations = {path: P(*("embed", "mlp", "heads")[: len(leaf.shape)]) for path, leaf in leaves.items()}
    message = conflicts(None, annotations=annotations)
    assert len(message.splitlines()) == 2 and len(message) < 500
    assert f"and {len(leaves) - 1} more parameters: 'embed' is no mesh axis (nor are 'mlp', 'heads')" in message
    rules = eval(re.search(r"rules=(\[.*?\)\)\])", message).group(1), {"P": P})
    assert specs(rules, annotations=annotations)["blocks/0/attn/query/bias"] == P("tensor", "fsdp")


def test_a_rule_may_be_for_an_annotated_array_that_is_no_parameter():
    rules = [*RULES, (r"stats/mean", P("tensor"))]
    assert "rule 5 ('stats/mean', P('tensor')) matches no parameter" in conflicts(rules)
    rules = [(r"stats/mean", P("tensor")), *RULES]
    assert sl.match_rules(SHAPES, rules, CUBE, others=["stats/mean"]).splits
    assert split_annotated("stats/mean", (4,), P("embed"), CUBE, rules).whole == P("tensor")
    assert split_annotated("other/mean", (4,), None, CUBE, [(".*", P("tensor"))]).whole == P()
    with pytest.raises(sl.LayoutError, match=r"'embed' is no mesh axis: .*, or give a rule for it, which overrides"):
        split_annotated("stats/mean", (4,), P("embed"), CUBE)
    with pytest.raises(
        sl.LayoutError, match=r"mean \(3,\): the annotation P\('tensor'\): dim 0 of size 3 does not div"
    ):
        split_annotated("mean", (3,), P("tensor"), CUBE)


def test_an_axis_that_splits_nothing_is_an_error():
    message = conflicts([(r".*", P())])
    assert "tensor=2 splits nothing: no rule and no annotation names 'tensor'. Use tensor=1, or add a rule" in message
    assert 'rules=[(r"^embed/embedding$", P(None, "tensor")), (r".*", P())]' in message
    message = conflicts(None, sl.Layout(fsdp=8), {"a": shape(3), "b": shape(12, 5)})
    assert (
        "fsdp=8 splits nothing: no parameter has a free dim that divides by 8, not even the largest, b (12, 5)"
        in message
    )
    assert "use data=8 and fsdp=1" in message


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"kernel": P()}, "rules: a dict; it is a list of"),
        ([("kernel",)], r"rule 0 is \('kernel',\); it is a pair"),
        ([("kernel", (None, "tensor"))], r"rule 0 \('kernel'\): \(None, 'tensor'\) is no PartitionSpec"),
        ([("ker(nel", P())], r"rule 0: 'ker\(nel' is no regular expression: missing \)"),
    ],
)
def test_rules_of_another_form_are_refused(rules, message: str):
    with pytest.raises(sl.LayoutError, match=message):
        sl.match_rules(SHAPES, rules, CUBE)


def test_nothing_to_split_and_sizes_left_open_are_errors():
    with pytest.raises(sl.LayoutError, match="there are no parameters to split"):
        sl.match_rules({}, None, CUBE)
    with pytest.raises(sl.LayoutError, match="fsdp=-1 is not filled yet"):
        sl.match_rules(SHAPES, None, sl.Layout(fsdp=-1))


def test_large_copies_are_a_warning_with_the_bytes_and_the_rule():
    big = {"wide": {"kernel": shape(1024, 1024)}, "head": {"kernel": shape(8, 8)}}
    rules = [("head", P(None, "tensor")), (".*", P())]
    with pytest.warns(sl.ReplicatedParameterWarning) as caught:
        sl.match_rules(big, rules, sl.Layout(tensor=4))
    [message] = [str(warning.message) for warning in caught]
    assert (
        "wide/kernel (1024, 1024) float32: 4,194,304 bytes on each device, the same on the 4 of tensor=4, " in message
    )
    assert "3,145,728 more than a share of it; add the rule (r\"^wide/kernel$\", P(None, 'tensor'))" in message
    assert "head" not in message
    with warnings.catch_warnings():
        warnings.simplefilter("error", sl.ReplicatedParameterWarning)
        sl.match_rules(big, [("kernel", P(None, "tensor"))], sl.Layout(tensor=4))
        sl.match_rules(big, None, sl.Layout(data=8))  # nothing else was asked for
        sl.match_rules(
            {"a": shape(LARGE // 4 - 1), "b": shape(8, 8)}, [("b", P("tensor")), ("a", P())], sl.Layout(tensor=2)
        )
        sl.match_rules({"a": np.zeros((1024, 1024))}, None, sl.Layout(fsdp=8))
