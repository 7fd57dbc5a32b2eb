"""`sl.generate` makes what the model says, the same on any layout, in any company, and compiles it once."""

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.generate.api import room, rows_of
from shardlm.generate.loop import programs
from shardlm.generate.model import ShardedModel
from shardlm.generate.sampling import penalise, process
from tests.generate.settings import LEARNED, TALKER, VOCAB, devices, log_softmax, parameters, plain_logits

pytestmark = pytest.mark.usefixtures("x64_module")

RANDOM = np.random.default_rng(5)
PROMPTS = [RANDOM.integers(0, VOCAB, n) for n in (20, 3, 7, 11, 1, 5, 16, 12, 9, 40, 2)]
LIMITS = [3, 12, 9, 7, 1, 12, 8, 10, 12, 5, 11]
DRAWN = {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "seeds": 100}
ROOM = {"max_length": 64, "prefill_chunk": 8}


class Letters:
    """Id i is the letter chr(48 + i); enough of a tokenizer."""

    eos_token_id = 5

    def encode(self, text):
        return [ord(c) - 48 for c in text]

    def decode(self, ids):
        assert all(type(i) is int for i in ids)
        return "".join(chr(48 + i) for i in ids)


def run(prompts, layout="data=1", config=TALKER, **options):
    layout = sl.Layout.parse(layout)
    options = ROOM | {"devices": devices(layout)} | options
    return sl.generate(config, parameters(config), prompts, layout, **options)


def lists(result):
    return [tokens.tolist() for tokens in result.tokens]


@pytest.fixture(scope="module")
def drawn():
    """All prompts side by side on one device."""
    return run(PROMPTS, max_new_tokens=LIMITS, batch_size=16, logprobs=2, **DRAWN)


@pytest.fixture(scope="module")
def likeliest():
    """Greedy continuations of some prompts, four at a time."""
    return run(PROMPTS[:6], max_new_tokens=10, batch_size=4)


def test_the_likeliest_tokens_are_those_of_the_module_without_a_cache(likeliest):
    for prompt, tokens in zip(PROMPTS, likeliest.tokens, strict=False):
        ids = [*prompt, *tokens]
        expected = plain_logits(TALKER, ids)[len(prompt) - 1 : -1].argmax(-1)
        assert (tokens.dtype, tokens.tolist()) == (np.int32, expected.tolist())
    assert len({tuple(tokens) for tokens in lists(likeliest)}) == 6


def test_drawn_tokens_are_drawn_from_the_processed_logits(drawn):
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, drawn.tokens, strict=True)):
        ids = [*prompt, *tokens]
        assert len(tokens) == LIMITS[i]
        logits = plain_logits(TALKER, ids)[len(prompt) - 1 : -1]
        kind = ("temperature", "top_k", "top_p")
        for n, (row, token) in enumerate(zip(logits, tokens, strict=True)):
            seen = np.isin(np.arange(VOCAB), ids[: len(prompt) + n])
            row = process(penalise(row[None], seen[None], 1.2), None, kind, DRAWN)[0]
            key = jax.random.fold_in(jax.random.key(100 + i), n)
            assert token == int(jax.random.categorical(key, row)), (i, n)


def test_logprobs_are_the_models_own(drawn):
    for prompt, made in zip(PROMPTS, drawn, strict=True):
        z = log_softmax(plain_logits(TALKER, [*prompt, *made.tokens])[len(prompt) - 1 : -1])
        np.testing.assert_allclose(made.logprobs, z[np.arange(len(z)), made.tokens], rtol=1e-6)
        order = np.argsort(-z, axis=-1)[:, :2]
        np.testing.assert_array_equal(made.top_tokens, order)
        np.testing.assert_allclose(made.top_logprobs, np.take_along_axis(z, order, -1), rtol=1e-6)


@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4"])
def test_the_same_text_on_any_layout_with_continuous_batching(drawn, layout):
    # Eleven requests in eight rows: rows are taken over while others go on.
    found = run(PROMPTS, layout, max_new_tokens=LIMITS, batch_size=8, logprobs=2, **DRAWN)
    assert lists(found) == lists(drawn)


def test_the_same_text_in_any_company(drawn):
    order = [9, 1, 4, 10, 7]
    few = run(
        [PROMPTS[i] for i in order], max_new_tokens=[LIMITS[i] for i in order], batch_size=16, logprobs=2,
        **DRAWN | {"seeds": [100 + i for i in order]},
    )  # fmt: skip
    assert lists(few) == [drawn.tokens[i].tolist() for i in order]
    other = run([PROMPTS[1]], max_new_tokens=LIMITS[1], batch_size=16, logprobs=2, **DRAWN | {"seeds": 7})
    assert other.tokens[0].tolist() != drawn.tokens[1].tolist()


def compiled(kind=(), rows=4, top=0):
    layout = sl.Layout()
    found = programs(ShardedModel.of(TALKER, layout, devices(layout)), rows, 64, 8, kind, top)
    return found.prefill._cache_size(), found.decode._cache_size()


def test_nothing_is_compiled_again_for_other_requests(likeliest):
    assert compiled() == (1, 1)
    for prompts, limit in ([PROMPTS[9]], 3), (PROMPTS[3:5], 20), (PROMPTS, [*LIMITS[:10], 40]):
        run(prompts, max_new_tokens=limit, batch_size=4)
    assert compiled() == (1, 1)
    # Settings that are numbers are no reason either.
    for temperature, seed in (0.5, 1), (2.0, 2):
        run(PROMPTS[:2], max_new_tokens=2, batch_size=4, temperature=temperature, seeds=seed)
    assert compiled(("temperature",)) == (1, 1)


def test_a_stream_gives_the_same_tokens_in_pieces(likeliest):
    tokens, ends = {}, {}
    for piece in run(PROMPTS[:6], max_new_tokens=10, batch_size=4, stream=True, stream_every=3):
        assert len(piece.tokens) <= 3 and piece.text is None and piece.request not in ends
        tokens.setdefault(piece.request, []).extend(piece.tokens.tolist())
        if piece.reason:
            ends[piece.request] = piece.reason
    assert [tokens[i] for i in range(6)] == lists(likeliest)
    assert ends == dict.fromkeys(range(6), "length")


def test_an_end_token_ends_a_row_and_is_its_last(likeliest):
    eos = [int(likeliest.tokens[0][4]), int(likeliest.tokens[1][2])]
    found = run(PROMPTS[:6], max_new_tokens=10, batch_size=4, eos=eos)
    for whole, made in zip(lists(likeliest), found, strict=True):
        first = next((n for n, token in enumerate(whole) if token in eos), 9)
        assert made.tokens.tolist() == whole[: first + 1]
        assert made.reason == ("eos" if whole[first] in eos else "length")
    assert {made.reason for made in found} == {"eos", "length"} or len(found.tokens[0]) <= 5


def test_text_and_stop_strings(likeliest):
    tokenizer = Letters()
    texts = [tokenizer.decode(prompt.tolist()) for prompt in PROMPTS[:6]]
    whole = run(texts, max_new_tokens=10, batch_size=4, tokenizer=tokenizer, eos=())
    assert lists(whole) == lists(likeliest)
    assert whole.texts == [tokenizer.decode(tokens) for tokens in lists(likeliest)]
    stop = whole.texts[0][3:5]
    found = run(texts, max_new_tokens=10, batch_size=4, tokenizer=tokenizer, eos=(), stop=[stop, "never"])
    pieces = list(
        run(texts, max_new_tokens=10, batch_size=4, tokenizer=tokenizer, eos=(), stop=stop, stream=True, stream_every=1)
    )
    for i, (text, made) in enumerate(zip(whole.texts, found, strict=True)):
        at = text.find(stop)
        assert made.text == (text if at < 0 else text[:at])
        assert (made.reason, len(made.tokens)) == (("length", 10) if at < 0 else ("stop", at + len(stop)))
        assert "".join(piece.text for piece in pieces if piece.request == i) == made.text
        assert [piece.reason for piece in pieces if piece.request == i][-1] == made.reason
    assert found[0].reason == "stop"
    ended = run(texts[:1], max_new_tokens=10, batch_size=4, tokenizer=Ending(int(whole.tokens[0][2])))
    assert (ended[0].reason, ended[0].text) == (
        "eos",
        whole.texts[0][: whole.tokens[0].tolist().index(ended.tokens[0][-1])],
    )


class Ending(Letters):
    """The tokenizer names the end token."""

    def __init__(self, eos):
        self.eos_token_id = eos


def test_a_result_says_what_it_took(drawn):
    assert drawn.prefill_tokens == sum(map(len, PROMPTS))
    assert len(drawn) == 11 and drawn[2] is list(drawn)[2]
    assert 0 < drawn.decode_tokens < sum(LIMITS)
    assert drawn.tokens_per_second == pytest.approx(sum(LIMITS) / drawn.seconds)
    assert "11 completions, 90 tokens in" in str(drawn)
    assert drawn.plan.startswith("generation on data=1: 16 rows, 16 on each device, of up to 64 tokens")


def test_logits_that_are_not_numbers_are_an_error():
    broken = jax.tree.map(lambda x: x * np.nan, parameters(TALKER))
    with pytest.raises(ArithmeticError, match="the model's logits for prompt 1 are not numbers"):
        sl.generate(TALKER, broken, PROMPTS[:4], max_new_tokens=3, batch_size=4, **ROOM)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": "text"}, TypeError, r"prompts is a str; it is a list"),
        ({"prompts": [1, 2]}, TypeError, r"prompts holds numbers; .* \[prompt\]"),
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": ["text"]}, ValueError, "prompts are strings, and there is no tokenizer"),
        ({"prompts": [[1], [], [2, 67], [0.5]]}, ValueError,
         r"prompt 1 has shape \[0\].*; prompt 2 has ids from 2 to 67; the model has 0 to 66; prompt 3 is float64"),
        ({"prompts": [[1], [-1]]}, ValueError, "prompt 1 has ids from -1 to -1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 is not a whole number from 1"),
        ({"max_new_tokens": [3]}, ValueError, "max_new_tokens has 1 entries for 2 prompts"),
        ({"max_new_tokens": 60}, ValueError, "prompt 0 of 20 tokens and 60 new ones come to 80, more than the 64 of "
         "max_length: at most 44 can follow"),
        ({"max_length": 2.5}, ValueError, "max_length=2.5 is not a whole number from 1, or None"),
        ({"seeds": -1}, ValueError, "seed -1 is not from 0 to 4294967295"),
        ({"temperature": 1.0, "top_p": 2.0}, ValueError, "top_p=2.0 is not above 0 and at most 1"),
        ({"eos": 67}, ValueError, r"eos: \[67\] are not ids of the model, which has 0 to 66"),
        ({"stop": "x"}, ValueError, "stop='x' is looked for in text, and there is no tokenizer"),
        ({"stop": ""}, ValueError, "stop holds an empty string"),
        ({"stop": [3]}, TypeError, r"stop=\[3\]; it is a string or several"),
        ({"stream_every": 65}, ValueError, "stream_every=65 is not a whole number from 1 to 64"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk=0 is not a whole number from 1"),
        ({"logprobs": 68}, ValueError, "logprobs=68 is not True, False, or a number of tokens up to 67"),
        ({"batch_size": 6, "layout": "data=2,fsdp=2,tensor=2"}, sl.LayoutError,
         "batch_size=6 is not a positive multiple of data=2 x fsdp=2 = 4, .*: use 4 or 8"),
        ({"num_beams": 0}, ValueError, "num_beams=0 is not a whole number from 2"),
        ({"length_penalty": 2.0}, ValueError, "num_beams=1 is not a whole number from 2"),
        ({"num_beams": 3, "temperature": 1.0, "stream": True}, ValueError,
         "num_beams=3 goes without sampling or a penalty, stream"),
        ({"num_beams": 3, "early_stopping": "maybe"}, ValueError, "early_stopping='maybe' is not True, False"),
        ({"num_beams": True}, ValueError, "num_beams=True is not a whole number from 2"),
        ({"num_beams": 2, "length_penalty": 1e308}, ValueError, "length_penalty=1e.308 is not a number from -8 to 8"),
        ({"num_beams": 10**9}, ValueError, r"2,000,000,000 rows of .* tokens does not fit in memory: .* for the cache"),
        ({"max_new_tokens": 10**12, "max_length": None}, ValueError, "rows of 1,[0-9,]* .* up to 2,147,483,647"),
        ({"max_new_tokens": 10**9, "max_length": None, "batch_size": 1024}, ValueError,
         r"1,024 rows of up to 1,[0-9,]* tokens does not fit in memory: it takes on the device .* for the cache"),
        ({"batch_size": 10**12}, ValueError, "1,000,000,000,000 rows of up to 64 tokens does not fit"),
        ({"prompts": [[1, [2]]]}, ValueError, "prompt 0 is object; token ids are integers"),
        ({"prompts": [None, [1]]}, TypeError, "prompt 0 is a NoneType; it is a string, or a list of token ids"),
        ({"prompts": {1: 2}}, TypeError, "prompts is a dict; it is a list"),
        ({"seeds": [[1], [2]]}, ValueError, r"seed \[1\] is not from 0"),
        ({"eos": True}, ValueError, r"eos: \[True\] are not ids"),
        ({"stop": 5}, TypeError, "stop=5; it is a string or several"),
        ({"tokenizer": object()}, TypeError, "object is no tokenizer: it has no method encode"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_errors(changes, error, message):
    options = {"prompts": PROMPTS[:2], "max_new_tokens": 4} | changes
    with pytest.raises(error, match=message):
        run(**options)


def test_more_than_the_learned_positions_is_an_error():
    with pytest.raises(ValueError, match="come to 26, more than the 24 of learned positions: at most 4 can follow"):
        run(PROMPTS[:1], config=LEARNED, max_new_tokens=6, max_length=None)
    with pytest.raises(ValueError, match=r"prompt 9 of 40 tokens .* shorten the prompt"):
        run(PROMPTS, config=LEARNED, max_new_tokens=1, max_length=None)


def test_rows_and_room_are_rounded_so_that_programs_are_shared():
    layout = sl.Layout(data=2, fsdp=2, tensor=2)
    assert [rows_of(layout, n, None) for n in (1, 4, 5, 9, 33, 1000)] == [4, 4, 8, 16, 64, 64]
    assert [room(n, None) for n in (1, 128, 129, 1025, 5000)] == [128, 128, 256, 1280, 5120]
    assert room(100, 24) == 24
