"""What of a continuation is shown while it is made never has to be taken back."""

import numpy as np
import pytest

from shardlm.data import ByteTokenizer
from shardlm.generate.text import Detokenizer, stop_strings

TOKENIZER = ByteTokenizer()
TEXT = "né ## stop\n#! done"
IDS = TOKENIZER.encode(TEXT).tolist()
EOS = np.array([256, -1])


@pytest.mark.parametrize("stop", [(), ("stop",), ("#!", "stop!"), ("op\n#", "\n"), ("é",)])
def test_what_is_visible_only_grows_into_the_whole_text(stop):
    detokenizer = Detokenizer(TOKENIZER, EOS, stop)
    kept = detokenizer.stops(IDS) or len(IDS)
    shown = [detokenizer.visible(IDS[:n]) for n in range(1, kept)]
    shown.append(detokenizer.text(IDS[:kept]))
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False))
    first = min((TEXT.index(s) + len(s), TEXT.index(s)) for s in (*stop, TEXT[-1]) if s in TEXT)  # completed first
    assert shown[-1] == (TEXT[: first[1]] if first[0] < len(TEXT) else TEXT)
    assert not any("\ufffd" in text for text in shown)


def test_it_takes_the_fewest_tokens_that_complete_a_stop_string():
    assert Detokenizer(TOKENIZER, EOS, ("stop",)).stops(IDS) == IDS.index(ord("p")) + 1
    assert Detokenizer(TOKENIZER, EOS, ("nowhere",)).stops(IDS) is None
    assert Detokenizer(TOKENIZER, EOS, ("n",)).stops(IDS) == 1


def test_the_end_token_is_no_text():
    assert Detokenizer(TOKENIZER, EOS).text([104, 105, 256]) == "hi"


def test_stop_strings_are_one_or_several():
    assert stop_strings("a", TOKENIZER) == ("a",)
    assert stop_strings(["a", "b"], TOKENIZER) == ("a", "b")
    assert stop_strings(None, None) == ()
