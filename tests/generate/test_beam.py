"""Beam search finds what a search written with Python lists finds, and, with room for all, the best there is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardlm as sl
from shardlm.generate.beam import Beam, Beams, advance
from tests.generate.settings import TALKER, VOCAB, devices, log_softmax, parameters, plain_logits

pytestmark = pytest.mark.usefixtures("x64_module")

TINY, NEW = 5, 6  # tokens of the toy models, and how many they may say
EOS = (3, 4)


def toy(seed):
    """A model whose next token depends on the last two: log-probabilities [first, second, next]."""
    return log_softmax(np.random.default_rng(seed).normal(0, 1.5, (TINY, TINY, TINY)))


def reference(next_log_probabilities, eos, limit, beams, length_penalty, early_stopping):
    """The best continuation and its score, by the rules of transformers' `_beam_search`, one prompt at a time."""
    running, finished, promising = [(0.0, ())], [], True
    keep = max(2, 1 + len(eos)) * beams
    while True:
        n = len(running[0][1]) + 1
        candidates = [
            (score + z, (*ids, token))
            for score, ids in running
            for token, z in enumerate(next_log_probabilities(ids))
        ]  # fmt: skip
        candidates = sorted(candidates, key=lambda c: -c[0])[:keep]
        ends = [ids[-1] in eos or n >= limit for _, ids in candidates]
        full = len(finished) == beams and early_stopping is True
        if promising and not full:
            best = [
                (s / n**length_penalty, ids) for (s, ids), end in zip(candidates[:beams], ends, strict=False) if end
            ]
            finished = sorted(finished + best, key=lambda c: -c[0])[:beams]
        running = [c for c, end in zip(candidates, ends, strict=True) if not end][:beams]
        hope_length = limit if early_stopping == "never" and length_penalty > 0 else n
        if running:
            hope = running[0][0] / hope_length**length_penalty
            # With a place still free among the finished, anything can enter.
            promising = promising and (len(finished) < beams or hope > finished[-1][0])
        done = not promising or not running or (early_stopping is True and len(finished) == beams)
        if done or n >= limit:
            return max(finished, key=lambda c: c[0])


def search(tables, options, limits, eos=EOS):
    """`advance` until all prompts are done: their best continuations and scores."""
    keep, table = max(2, 1 + len(eos)) * options.beams, jnp.asarray(tables)
    ends, limits = jnp.array([*eos, -1]), jnp.asarray(limits, jnp.int32)

    @jax.jit
    def step(beams):
        last = [
            jnp.where(beams.made > back, jnp.take(beams.tokens, jnp.maximum(beams.made - 1 - back, 0), axis=2), 0)
            for back in (1, 0)
        ]
        prompt = jnp.arange(len(tables))[:, None]
        return advance(beams, table[prompt, last[0], last[1]], ends, limits, options, keep)[0]

    beams = Beams.start(len(tables), options.beams, NEW, jnp.float64)
    while np.asarray(beams.open).any():
        beams = step(beams)
    return [
        (float(beams.best_scores[i, 0]), tuple(np.asarray(beams.best)[i, 0, : beams.lengths[i, 0]].tolist()))
        for i in range(len(tables))
    ]


def of(table):
    return lambda ids: table[(0, 0, *ids)[-2], (0, 0, *ids)[-1]]


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"),
    [(1.0, False), (1.0, True), (1.0, "never"), (0.0, "never"), (2.0, False), (-1.0, "never")],
)
def test_it_finds_what_lists_find(length_penalty, early_stopping):
    options = Beam(beams=3, length_penalty=length_penalty, early_stopping=early_stopping)
    tables, limits = [toy(seed) for seed in range(40)], [NEW - seed % 3 for seed in range(40)]
    found = search(tables, options, limits)
    for (score, ids), table, limit in zip(found, tables, limits, strict=True):
        expected = reference(of(table), EOS, limit, 3, length_penalty, early_stopping)
        assert ids == expected[1]
        assert score == pytest.approx(expected[0], rel=1e-12)
    assert len({len(ids) for _, ids in found}) > 2


def test_settings_matter():
    tables, limits = [toy(seed) for seed in range(40)], [NEW] * 40
    found = [
        search(tables, Beam(beams=3, length_penalty=p, early_stopping=e), limits)
        for p, e in ((1.0, False), (1.0, True), (-1.0, "never"))
    ]
    assert found[0] != found[1] != found[2] != found[0]


def test_with_room_for_all_it_is_the_best_there_is():
    # 5 ** 2 beams hold every prefix of two tokens: nothing is ever dropped before the third.
    table, limit = toy(3), 3
    [(score, ids)] = search([table], Beam(beams=25, length_penalty=0.0, early_stopping="never"), [limit], eos=())
    scores = {
        ids: sum(of(table)(ids[:n])[token] for n, token in enumerate(ids))
        for ids in itertools.product(range(TINY), repeat=limit)
    }
    assert ids == max(scores, key=scores.__getitem__)
    assert score == pytest.approx(scores[ids], rel=1e-12)


PROMPTS = [np.array([5, 60, 2]), np.array([9]), np.arange(11), np.array([7, 7])]
ENDS = [4, 17, 33, 40, 51]


@functools.cache
def from_lists(limit):
    @functools.cache
    def next_log_probabilities(prompt, ids):
        return log_softmax(plain_logits(TALKER, [*PROMPTS[prompt], *ids])[-1])

    return [
        reference(functools.partial(next_log_probabilities, i), ENDS, limit, 3, 1.0, False) for i in range(len(PROMPTS))
    ]


@pytest.mark.parametrize("layout", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_generate_searches_on_any_layout(layout):
    layout = sl.Layout.parse(layout)
    found = sl.generate(
        TALKER, parameters(TALKER), PROMPTS, layout, devices=devices(layout), num_beams=3, max_new_tokens=5, eos=ENDS,
        max_length=24, prefill_chunk=4,
    )  # fmt: skip
    for made, (score, ids) in zip(found, from_lists(5), strict=True):
        assert made.tokens.tolist() == list(ids)
        assert made.scores[0] == pytest.approx(score, rel=1e-9)
        assert list(made.scores) == sorted(made.scores, reverse=True)
        assert len(made.beams) == len(made.scores) <= 3 and made.beams[0] is made.tokens
        assert made.reason == ("eos" if ids[-1] in ENDS else "length")
    greedy = [log_softmax(plain_logits(TALKER, prompt)[-1]).argmax() for prompt in PROMPTS]
    assert [made.tokens[0] for made in found] != greedy
    assert max(max(tokens) for tokens in found.tokens) < VOCAB
