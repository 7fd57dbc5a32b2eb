"""A sample is what the model says is likely, token by token, on any layout."""

import jax
import numpy as np
import pytest
from flax import nnx

import shardlm as sl

pytestmark = pytest.mark.usefixtures("x64_module")

VOCABULARY, WINDOW = 67, 8
CONFIG = sl.TransformerConfig(
    vocab_size=VOCABULARY, num_layers=2, d_model=16, num_heads=2, d_ff=24, vocab_multiple=8, init_std=0.5,
    dtype="float64", param_dtype="float64",
)  # fmt: skip
PROMPT = np.array([3, 61, 5, 5, 66])


def make_trainer(layout: sl.Layout, **options) -> sl.Trainer:
    return sl.Trainer(CONFIG, layout, seed=4, devices=jax.devices()[: layout.num_devices], **options)


@pytest.fixture(scope="module")
def one() -> tuple[sl.Trainer, sl.TrainState]:
    trainer = make_trainer(sl.Layout())
    return trainer, trainer.init()


@pytest.fixture(scope="module")
def cube() -> tuple[sl.Trainer, sl.TrainState]:
    trainer = make_trainer(sl.Layout(data=2, fsdp=2, tensor=2, sequence_parallel=True))
    return trainer, trainer.init()


@pytest.fixture(scope="module")
def logits():
    """The plain module's logits after the last of at most eight tokens: causality hides what pads them."""
    graph, state = jax.jit(lambda: nnx.split(sl.Transformer(CONFIG, rngs=nnx.Rngs(4))))()
    model = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens[None])[0])
    return lambda ids: model(np.array([*ids, *[0] * (WINDOW - len(ids))]))[len(ids) - 1]


@pytest.fixture(scope="module")
def likeliest(logits) -> list[int]:
    """Twelve tokens after the prompt, each from the eight before it, or fewer."""
    ids = PROMPT.tolist()
    for _ in range(12):
        ids.append(int(np.argmax(logits(ids[-WINDOW:]))))
    return ids[len(PROMPT) :]


def test_the_likeliest_tokens_are_those_of_the_module(one, likeliest):
    found = sl.sample(*one, PROMPT, tokens=12, window=WINDOW, temperature=0)
    assert (found.dtype, found.tolist()) == (np.dtype("int32"), likeliest)
    assert len(set(likeliest)) > 3  # not one token again and again, which would hide much


def test_they_are_the_same_on_another_layout(cube, likeliest):
    assert sl.sample(*cube, PROMPT, tokens=12, window=WINDOW, temperature=0).tolist() == likeliest


def test_drawn_tokens_are_the_same_on_another_layout(one, cube):
    found = [
        sl.sample(*each, PROMPT, tokens=12, window=WINDOW, temperature=1.5, seed=9).tolist() for each in (one, cube)
    ]
    assert found[0] == found[1]
    assert max(found[0]) < VOCABULARY  # padding is never drawn
    other = sl.sample(*one, PROMPT, tokens=12, window=WINDOW, temperature=1.5, seed=10)
    assert other.tolist() != found[0]


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_a_draw_is_from_the_softmax_of_logits_over_temperature(one, logits, temperature):
    found = sl.sample(*one, PROMPT, tokens=1, window=WINDOW, temperature=temperature, seed=2)
    key = jax.random.split(jax.random.key(2), 1)[0]
    assert int(found[0]) == int(jax.random.categorical(key, logits(PROMPT) / temperature))


def test_a_prompt_longer_than_the_window_counts_by_its_end(one):
    long = np.concatenate([np.arange(40), PROMPT, [1, 2, 3]]).astype(np.uint16)
    found = [sl.sample(*one, ids, tokens=3, window=WINDOW, temperature=0).tolist() for ids in (long, long[-WINDOW:])]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": np.array([], int)}, r"the prompt is int64\[0\]; it is one row of at least one token id"),
        ({"prompt": np.array([[1, 2]])}, r"the prompt is int64\[1, 2\]; it is one row"),
        ({"prompt": np.array([1.0])}, r"the prompt is float64\[1\]; it is one row"),
        ({"prompt": np.array([1, 67])}, "the prompt's ids go from 1 to 67; the model has 0 to 66"),
        ({"prompt": np.array([-1, 3])}, "the prompt's ids go from -1 to 3"),
        ({"prompt": np.array([2**32 + 1])}, "the prompt's ids go from 4294967297"),
        ({"window": 0}, "window=0; it is a whole number from 1"),
        (
            {"tokens": 2.5, "seed": "x"},
            "tokens=2.5; it is a whole number from 1; seed='x'; it is a whole number from 0",
        ),
        ({"tokens": 10**12}, "tokens=1,000,000,000,000, window=8 does not fit in memory: .* each of 8 devices 12 TB"),
        ({"prompt": [[1, 2], [3]]}, r"the prompt is object\[2\]; it is one row"),
        ({"tokens": 0}, "tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"window": 7}, "sequence=7 is not a positive multiple of tensor=2"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(cube, changes, message):
    with pytest.raises(ValueError, match=message):
        sl.sample(*cube, **({"prompt": PROMPT, "tokens": 2, "window": WINDOW} | changes))


def test_a_window_beyond_the_learned_positions_is_an_error():
    config = sl.TransformerConfig(
        vocab_size=VOCABULARY, num_layers=1, d_model=16, num_heads=2, positions=sl.LearnedPositions(length=4)
    )
    trainer = sl.Trainer(config)
    with pytest.raises(ValueError, match="a sequence of 8 tokens is longer than the 4 learned positions"):
        sl.sample(trainer, trainer.init(), PROMPT, tokens=2, window=WINDOW)


def test_the_state_stays_usable(one):
    trainer, state = one
    sl.sample(trainer, state, [1], tokens=1, window=WINDOW)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
