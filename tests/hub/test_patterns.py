"""Expressions that files bring: those in use are taken, and none that is taken goes on for ever."""

import time

import pytest

from shardlm.hub.patterns import compile_pattern

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|q_proj|v_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.(0|1|2)\.self_attn\.(q|k|v|o)_proj",
        r".*layers.*(self_attn|mlp).*_proj",
        r"^(?!.*lm_head).*_proj$",
        r"[a-z_]+\.[]a\]]+?(x)?",
        UNSLOTH,
    ],
)
def test_what_is_in_use_is_taken(pattern):
    compile_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"([a-z._0-9]+)+X", "a repeated group that holds repetitions or alternatives"),
        (r"(?:(?:a*)b?)*X", "a repeated group"),
        (r"((a|a))*X", "a repeated group"),
        (r"(.|\w){1,500}X", "a repeated group"),
        (r".*.*.*.*.*X", "more than 4 repetitions"),
        (r"(?:.*.*|a)(?:.*.*.*|b)X", "more than 4 repetitions"),
        (r"(.+)\1\1X", "a reference back"),
        ("(", "not a regular expression"),
        ("a" * 5000, "5,000 letters"),
    ],
)
def test_what_may_take_for_ever_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        compile_pattern(pattern)


def test_the_worst_that_is_taken_ends():
    began = time.perf_counter()
    assert compile_pattern(r".*.*.*.*X").fullmatch("model.layers.31.self_attn.q_proj.weight" * 2) is None
    assert time.perf_counter() - began < 30
