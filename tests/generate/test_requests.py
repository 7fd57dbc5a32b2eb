"""Prompts, limits, seeds and end tokens, as they are given and as they are understood."""

import numpy as np

from shardlm.generate.requests import encode, end_tokens, requests
from tests.generate.settings import MIXED


class Bare:
    """Encodes to an object with ids, as `tokenizers` does."""

    ends = (3, 4)
    end = 3

    def encode(self, text):
        class Encoding:
            ids = [len(word) for word in text.split()]

        return Encoding()


class Special(Bare):
    """Leaves out what begins a text, unless asked."""

    ends = None

    def encode(self, text, *, special=False):
        return [1] * special + [len(word) for word in text.split()]


def test_prompts_are_ids_or_strings():
    found = requests(MIXED, ["ab c", [7], np.array([2, 3], np.uint8)], Bare(), 4, 10)
    assert [r.prompt.tolist() for r in found] == [[2, 1], [7], [2, 3]]
    assert all(r.prompt.dtype == np.int32 for r in found)
    assert [(r.index, r.limit, r.seed, r.length) for r in found] == [(0, 4, 10, 6), (1, 4, 11, 5), (2, 4, 12, 6)]


def test_limits_and_seeds_may_be_given_for_each():
    found = requests(MIXED, [[1], [2]], None, np.array([3, 5]), [2**32 - 1, 0])
    assert [(r.limit, r.seed) for r in found] == [(3, 2**32 - 1), (5, 0)]


def test_prompts_get_what_the_tokenizer_puts_around_a_text():
    assert requests(MIXED, ["ab c"], Special(), 4, 0)[0].prompt.tolist() == [1, 2, 1]
    assert encode(Special(), "ab c").tolist() == [2, 1]


def test_end_tokens_are_given_or_the_tokenizers():
    def ends(eos, tokenizer=None):
        found = end_tokens(MIXED, eos, tokenizer)
        assert found.shape == (8 * -(-max(1, len(found[found >= 0])) // 8),)
        return found[found >= 0].tolist()

    assert ends(None) == ends(()) == ends((), Bare()) == []
    assert ends(5, Bare()) == [5]
    assert ends(None, Bare()) == [3, 4]
    assert ends(None, Special()) == [3]
    assert ends(range(9)) == list(range(9))
