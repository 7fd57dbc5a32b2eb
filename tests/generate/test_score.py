"""Scores of given text are those of the plain module, however the text is cut."""

import math

import numpy as np
import pytest

import shardlm as sl
from shardlm.generate.judge import Span, cut
from tests.generate.settings import LEARNED, TALKER, VOCAB, devices, log_softmax, parameters, plain_logits

pytestmark = pytest.mark.usefixtures("x64_module")

RANDOM = np.random.default_rng(8)
TEXTS = [RANDOM.integers(0, VOCAB, n) for n in (30, 4, 41)]
LAYOUT = sl.Layout(data=2, fsdp=2, tensor=2)


class Words:
    """Ids by word and by trailing spaces: what is encoded together has other tokens than what is encoded apart."""

    bos_token_id = 1

    def __init__(self):
        self.words = {}

    def encode(self, text):
        words = text.replace(" ", "\0 ").split("\0")
        return [self.words.setdefault(word, 2 + len(self.words)) for word in words if word]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def call(function, *arguments, config=TALKER, **options):
    options = {"layout": LAYOUT, "batch_size": 4, "chunk": 8} | options
    return function(config, parameters(config), *arguments, devices=devices(options["layout"]), **options)


def plainly(ids, first=1, config=TALKER):
    """Log-probabilities of ids[first:], and whether each is the likeliest."""
    z = log_softmax(plain_logits(config, ids))[first - 1 : -1]
    after = np.asarray(ids[first:])
    return z[np.arange(len(after)), after], z.argmax(-1) == after


def test_a_continuation_has_the_sum_of_its_tokens():
    pairs = [(text[:n], text[n:]) for text, n in zip(TEXTS, (10, 3, 1), strict=True)]
    likeliest = [int(plain_logits(TALKER, TEXTS[0])[-1].argmax())]
    pairs += [(TEXTS[0], likeliest), (TEXTS[0][:5], [*TEXTS[0][5:9], 3])]
    found = call(sl.score.loglikelihood, pairs)
    for (context, continuation), (logprob, is_greedy, tokens) in zip(pairs, found, strict=True):
        z, greedy = plainly([*context, *continuation], len(context))
        assert logprob == pytest.approx(z.sum(), rel=1e-12)
        assert (is_greedy, tokens) == (greedy.all(), len(continuation))
    assert [x.is_greedy for x in found] == [False, False, False, True, False]


def test_text_is_encoded_as_the_harness_does():
    tokenizer = Words()
    whole = tokenizer.encode("the cat sat")
    found = call(
        sl.score.loglikelihood, [("the cat ", "sat"), ("the cat", " sat"), ("", "the cat")], tokenizer=tokenizer
    )
    assert found[0] == found[1]
    assert found[0].logprob == pytest.approx(plainly(whole, 2)[0].sum(), rel=1e-12)
    assert found[2].logprob == pytest.approx(plainly([1, *whole[:2]])[0].sum(), rel=1e-12)


def test_the_likeliest_choice():
    questions = [(TEXTS[0][:9], [[3], [4, 5, 6], [7, 8]]), (TEXTS[1], [[9], [10]])]
    sums = [[plainly([*context, *c], len(context))[0].sum() for c in choices] for context, choices in questions]
    for per_token in (False, True):
        found = call(sl.score.choose, questions, per_token=per_token)
        for (best, each), (_, choices), expected in zip(found, questions, sums, strict=True):
            np.testing.assert_allclose([x.logprob for x in each], expected, rtol=1e-12)
            lengths = [len(c) if per_token else 1 for c in choices]
            assert best == np.argmax(np.array(expected) / lengths)


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (8, 1), (64, None)])
def test_perplexity_slides_over_a_long_text(window, stride):
    found = call(sl.score.perplexity, TEXTS, window=window, stride=stride)
    step = window // 2 if stride is None else stride
    for text, made in zip(TEXTS, found, strict=True):
        total = plainly(text[: window + 1])[0].sum()
        for end in range(min(window + 1, len(text)), len(text), step):  # the definition, window by window
            last = min(end + step, len(text))
            start = max(0, last - 1 - window)
            total += plainly(text[start:last], end - start)[0].sum()
        assert made.logprob == pytest.approx(total, rel=1e-12)
        assert made.tokens == len(text) - 1
        assert made.perplexity == pytest.approx(math.exp(-total / made.tokens), rel=1e-12)
        assert made.bits_per_byte is None


def test_rolling_takes_every_token_once_after_the_prefix():
    found = call(sl.score.loglikelihood_rolling, TEXTS, prefix=1, window=8)
    for text, made in zip(TEXTS, found, strict=True):
        ids = [1, *text]
        # As the harness: disjoint parts of 8 with one token of context, the last one with all that fits.
        total, end = 0.0, 1
        while end < len(ids):
            last = min(end + 8, len(ids))
            start = max(0, last - 9)
            total += plainly(ids[start:last], end - start)[0].sum()
            end = last
        assert made == pytest.approx(total, rel=1e-12)


def test_bits_per_byte_of_a_text():
    tokenizer, text = Words(), "né né né tu"
    [made] = call(sl.score.perplexity, [text], tokenizer=tokenizer, window=8)
    assert made.bits_per_byte == pytest.approx(-made.logprob / math.log(2) / 14, rel=1e-12)


def test_text_until_a_stop_string():
    one = {"layout": sl.Layout(), "batch_size": 2, "max_length": 32, "prefill_chunk": 8, "eos": ()}
    tokenizer = Words()

    def until(pairs):
        options = {"tokenizer": tokenizer, **one}
        return sl.score.generate_until(TALKER, parameters(TALKER), pairs, devices=devices(sl.Layout()), **options)

    [whole] = until([("a b", {"max_gen_toks": 8})])
    assert len(whole) == 8
    found = until([("a b", {"until": whole[3], "max_gen_toks": 8}), ("a b", {"until": ["??"], "max_gen_toks": 5})])
    assert found == [whole[: whole.index(whole[3])], whole[:5]]
    with pytest.raises(ValueError, match=r"pair 0: unknown settings \['untl'\]; legal are until, max_gen_toks"):
        until([("a", {"untl": "x"})])


def test_spans_judge_every_token_but_the_first_once():
    assert cut(8, 4, 2) == [Span(0, 1, 5), Span(2, 5, 7), Span(3, 7, 8)]
    for length, window, stride in ((2, 4, 1), (5, 4, 4), (6, 4, 4), (23, 7, 3)):
        spans = cut(length, window, stride)
        assert [i for span in spans for i in range(span.first, span.end)] == list(range(1, length))
        assert all(span.end - 1 - span.start <= window and span.start < span.first for span in spans)


@pytest.mark.parametrize(
    ("function", "argument", "options", "message"),
    [
        ("loglikelihood", [([1], [])], {}, r"pair 0: the continuation \[\] has no tokens"),
        ("loglikelihood", [([], [1])], {}, "pair 0: the context is empty; give prefix="),
        (
            "loglikelihood",
            [(range(20), [1] * 6)],
            {"config": LEARNED},
            r"have 20 \+ 6 tokens, and the model takes 24: ",
        ),
        ("loglikelihood", [([1] * 3, [1] * 9)], {"max_length": 8, "truncate": True}, r"3 \+ 9 tokens, .* takes 8$"),
        ("loglikelihood", [("a", "b")], {}, "texts are strings, and there is no tokenizer"),
        ("loglikelihood", [([1], [67])], {}, "text 0 has int64 ids from 1 to 67; the model has 0 to 66"),
        ("loglikelihood_rolling", [[1, 2]], {}, "give prefix=, the id that text begins with"),
        ("perplexity", [[1]], {}, "text 0 has no token to judge after another one"),
        ("perplexity", [[1, 2]], {"window": 8, "stride": 9}, "stride=9 is not a whole number from 1 to window=8"),
        ("perplexity", [[1, 2]], {"window": 25, "config": LEARNED}, "window=25 is not a whole number from 1 to 24"),
        ("perplexity", [[1, 2]], {"chunk": 0}, "chunk=0 is not a whole number from 1"),
        ("choose", [([1], [])], {}, "question 0 has no choices"),
        (
            "loglikelihood",
            [([1], [2])],
            {"batch_size": 10**12},
            "1,000,000,000,000 rows of up to 128 tokens does",
        ),
        ("loglikelihood", ["ab"], {}, r"pair 0 is 'ab'; it is \(context, continuation\)"),
        ("loglikelihood", [([1], [2])], {"prefix": True}, "prefix=True is no id of the model, which has 0 to 66"),
        ("loglikelihood", [([1], [2])], {"max_length": 0}, "max_length=0 is not a whole number from 1, or None"),
        ("loglikelihood_rolling", [[[1, 2]]], {"prefix": 1}, r"text 0 has shape \[1, 2\]; it is a string, or one row"),
    ],
)
def test_what_cannot_be_scored_is_an_error(function, argument, options, message):
    with pytest.raises(ValueError, match=message):
        call(getattr(sl.score, function), argument, **options)


@pytest.mark.parametrize("function", ["loglikelihood", "loglikelihood_rolling", "perplexity", "choose"])
def test_one_text_is_no_list_of_texts(function):
    with pytest.raises(TypeError, match="is a str; it is a list, of one entry too"):
        call(getattr(sl.score, function), "text")


def test_a_text_of_no_tokens_has_log_probability_zero():
    assert call(sl.score.loglikelihood_rolling, [[]], prefix=1) == [0.0]


def test_a_context_that_is_too_long_is_cut_in_front_when_asked():
    ids = TEXTS[0]
    [found] = call(sl.score.loglikelihood, [(ids[:20], ids[20:23])], max_length=8, truncate=True)
    assert found.logprob == pytest.approx(plainly(ids[14:23], 6)[0].sum(), rel=1e-12)
