"""Any part of a parameter is what its row of the table reads from the file, and writes back."""

import numpy as np
import pytest

from shardlm.hub.registry import FAMILIES, NAMES
from shardlm.hub.table import Placed, Row, place, tensors

SIZES = {"vocab": 8, "embed": 6, "head": 4, "kv_head": 2, "head_dim": 3, "mlp": 10, "position": 7}
VOCABULARY = 5  # of 8 rows, three are padding
ROWS = sorted({(row.dims, row.part) for family in FAMILIES for row in family.rows})


def placed(dims: str, part: tuple[int, int], ours: list[str]) -> Placed:
    shape = [SIZES[dim] for dim in ours]
    named = [None if dim == "position" else dim for dim in ours]
    return Placed.of(Row("path", "name", dims, part), shape, named, VOCABULARY)


@pytest.mark.parametrize(("dims", "part"), ROWS)
def test_a_part_is_read_as_if_the_whole_had_been_cut(dims, part):
    rng = np.random.default_rng(0)
    ours = sorted(dims.replace("(", "").replace(")", "").split(), key=list(SIZES).index)
    where = placed(dims, part, ours)
    file = rng.standard_normal(where.file_shape)
    whole = where.read(file.__getitem__, [slice(None)] * len(ours), np.float64)
    assert whole.shape == tuple(SIZES[dim] for dim in ours)
    # Written once more it is the file, or its part of it.
    assert (where.write(whole) == np.split(file, part[1], axis=-1)[part[0]]).all()
    assert not whole[VOCABULARY:].any() or "vocab" not in ours
    for _ in range(20):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in whole.shape]
        index = tuple(slice(int(a), int(b)) for a, b in ends)
        np.testing.assert_array_equal(where.read(file.__getitem__, index, np.float64), whole[index])


def test_a_linear_layer_is_turned_and_a_fused_one_cut():
    file = np.arange(12 * 6).reshape(12, 6)
    query = placed("(head head_dim) embed", (0, 1), ["embed", "head", "head_dim"])
    whole = query.read(file.__getitem__, [slice(None)] * 3, np.int64)
    assert whole[5, 2, 1] == file[2 * 3 + 1, 5]
    key = placed("embed (kv_head head_dim)", (1, 3), ["embed", "kv_head", "head_dim"])
    fused = np.arange(6 * 18).reshape(6, 18)
    whole = key.read(fused.__getitem__, [slice(None)] * 3, np.int64)
    assert whole[5, 1, 2] == fused[5, 6 + 1 * 3 + 2]


def test_what_is_larger_than_a_block_is_copied_whole():
    where = Placed.of(Row("path", "name", "(head head_dim) embed"), (200, 3, 150), ["embed", "head", "head_dim"], 5)
    file = np.random.default_rng(0).standard_normal((3 * 150, 200))
    whole = where.read(file.__getitem__, [slice(None)] * 3, np.float64)
    np.testing.assert_array_equal(whole, file.T.reshape(200, 3, 150))
    np.testing.assert_array_equal(where.write(whole), file)


def test_fused_tensors_are_named_once_and_their_parts_in_order():
    sizes = {row.path: row for row in NAMES["gpt2"].rows if "c_attn.bias" in row.name}
    shapes = {path: ((2, 4, 3), ("layer", *row.groups[0])) for path, row in reversed(sizes.items())}
    made = tensors(place(list(sizes.values()), shapes, VOCABULARY), num_layers=2)
    assert [(tensor.name, tensor.shape, tensor.layer) for tensor in made] == [
        ("transformer.h.0.attn.c_attn.bias", (36,), 0),
        ("transformer.h.1.attn.c_attn.bias", (36,), 1),
    ]
    assert [path.split("/")[2] for path, _ in made[0].parts] == ["query", "key", "value"]


def test_no_family_names_a_parameter_or_a_tensor_twice():
    for family in FAMILIES:
        assert len({row.path for row in family.rows}) == len(family.rows)
        assert len({(row.name, row.part) for row in family.rows}) == len(family.rows)
