"""The forms in which compilers write communication are read, and a form that is not known is an error."""

import pytest

import shardlm as sl
from shardlm.inspect.hlo import Collective, collectives

MESH = sl.Layout(data=2, tensor=4).mesh()
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


def read(*lines: str, others: str = "") -> dict[Collective, int]:
    body = "\n".join(f"  {line}" for line in lines)
    return dict(collectives(f"{others}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}", MESH))


@pytest.mark.parametrize(
    ("line", "kind", "elements"),
    [
        (f"%s = f32[6]{{0}} all-reduce-start(%x), {GROUPS}", "all-reduce", [6]),
        (f"%s = (f32[6]{{0}}, f32[2]{{0}}) all-reduce-start(%x, %y), {GROUPS}", "all-reduce", [6, 2]),
        (f"%s = ((f32[6]{{0}}), f32[6]{{0}}) all-reduce-start(%x), {GROUPS}", "all-reduce", [6]),
        (f"%s = (f32[2]{{0}}, f32[8]{{0}}) all-gather-start(%x), {GROUPS}", "all-gather", [8]),
        (f"%s = ((f32[2], f32[3]), (f32[8], /*index=1*/f32[9])) all-gather-start(%x), {GROUPS}", "all-gather", [8, 9]),
        (f"%s = ((f32[8]{{0}}), f32[2]{{0}}) reduce-scatter-start(%x), {GROUPS}", "reduce-scatter", [8]),
        (f"%s = ((f32[8]), f32[8], u32[]) all-to-all-start(%x), {GROUPS}, dimensions={{0}}", "all-to-all", [8]),
        (f"%s = (f32[2], f32[2], f32[2], f32[2]) all-to-all(%a, %b, %c, %d), {GROUPS}", "all-to-all", [8]),
        (f"%s = f32[8,3]{{1,0:T(8,128)S(1)}} all-gather(%x), {GROUPS}", "all-gather", [24]),
        (
            "%s = (f32[5], f32[5], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3}}",
            "collective-permute",
            [5],
        ),
    ],
)  # fmt: skip
def test_started_and_combined(line: str, kind: str, elements: list[int]):
    assert read(line) == {Collective(kind, ("tensor",), n): 1 for n in elements}


def test_a_permutation_over_another_axis():
    line = "%s = bf16[5] collective-permute(%x), source_target_pairs={{0,4},{4,0}}"
    assert read(line) == {Collective("collective-permute", ("data",), 5, "bfloat16"): 1}


def test_ends_are_not_counted():
    assert read("%d = f32[8]{0} all-gather-done(%s)", "%e = f32[8] async-done(%t), calls=%gone") == {}


ASYNC = f"""
%wrapped (p: f32[8]) -> f32[2] {{
  ROOT %r = f32[2]{{0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}, to_apply=%sum
}}
"""


def test_generic_starts_and_branches_are_followed():
    moved = {Collective("reduce-scatter", ("tensor",), 8): 1}
    assert read("%s = ((f32[8]), f32[2], u32[]) async-start(%x), calls=%wrapped", others=ASYNC) == moved
    branch = "%s = f32[2] conditional(%i, %x, %x), branch_computations={%wrapped, %nothing}"
    assert read(branch, others=ASYNC + "\n%nothing (p: f32[8]) -> f32[2] {\n}\n") == moved


CHAIN = f"""
%start (p: f32[2]) -> f32[8] {{
  %a = f32[8] all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="3"}}
  ROOT %s = (f32[2], f32[8]) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}}

%step (p: f32[2]) -> f32[8] {{
  %b = f32[8] all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="3"}}
  ROOT %t = (f32[2]) tuple(%b)
}}
"""


def test_a_collective_fused_in_steps_is_one():
    start, step = "%f = () fusion(%x), calls=%start", "%g = () fusion(%f), calls=%step"
    assert read(start, step, others=CHAIN) == {Collective("all-gather", ("tensor",), 8): 1}
    with pytest.raises(AssertionError, match="never started"):
        read(step, others=CHAIN.partition("%step")[1] + CHAIN.partition("%step")[2])


LOOP = f"""
%condition (p: (s32[], f32[8])) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%p), index=0
  %j = s32[]{{:T(128)S(6)}} copy(%i)
  %next = s32[] add(%j, %one)
  %r = f32[8] all-reduce(%x), {GROUPS}, to_apply=%sum
  ROOT %out = (s32[], f32[8]) tuple(%next, %r)
}}
"""
ENTER = (
    "%begin = s32[] constant(2)",
    "%in = (s32[], f32[8]) tuple(%begin, %x)",
    "%w = (s32[], f32[8]) while(%in), condition=%condition, body=%body",
)


def test_a_loop_counts_from_its_first_to_its_last():
    assert read(*ENTER, others=LOOP) == {Collective("all-reduce", ("tensor",), 8): 5}


@pytest.mark.parametrize(
    ("known", "unknown"),
    [("direction=LT", "direction=NE"), ("s32[] constant(1)", "s32[] constant(2)"), ("add(%j", "multiply(%j")],
)
def test_a_loop_that_counts_otherwise_is_an_error(known: str, unknown: str):
    with pytest.raises(AssertionError, match="unknown length"):
        read(*ENTER, others=LOOP.replace(known, unknown))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"%s = f32[8] ragged-all-to-all(%x), {GROUPS}", "unknown communication"),
        ("%s = (f32[8], u32[], token[]) send(%x), channel_id=1", "unknown communication"),
        (f"%s = f32[8] collective-broadcast(%x), {GROUPS}", "unknown communication"),
        ('%s = f32[8] custom-call(%x), custom_call_target="AsyncCollectiveStep"', "unknown communication"),
        (f"%s = f32[8] all-gather-start(%x), {GROUPS}", "no pair"),
        ("%s = f32[8] all-gather(%x), replica_groups=@mesh[2]", "unknown syntax"),
        ("%s = f32[8] collective-permute(%x), source_target_pairs=@ring", "unknown syntax"),
        ("%s = f32[8] all-gather(%x), replica_groups={{0,3},{1,2},{4,7},{5,6}}", "follow no axes"),
    ],
)
def test_what_is_not_known_is_an_error(line: str, message: str):
    with pytest.raises(AssertionError, match=message):
        read(line)


def test_communication_that_nothing_calls_is_an_error():
    with pytest.raises(AssertionError, match="nothing is known to call wrapped"):
        read("%s = f32[2] novel(%x), runs=%wrapped", others=ASYNC)
