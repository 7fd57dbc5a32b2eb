"""What does not fit in memory is refused with the numbers and the fix, before anything is allocated or compiled."""

import re

import jax
import numpy as np
import pytest

import shardlm as sl
from shardlm.__main__ import main
from shardlm.inspect.program import bytes_per_device
from shardlm.models.transformer import count_parameters
from shardlm.runtime import memory
from shardlm.train import room
from tests.hub.cases import CASES, DATA

CONFIG = sl.presets.tiny()


@pytest.fixture
def free(monkeypatch):
    """Sets what the machine has free."""
    return lambda count: monkeypatch.setattr(memory, "host_memory", lambda: int(count))


def trainer(layout="data=2,fsdp=2,tensor=2", config=CONFIG, **settings):
    return sl.Trainer(config, sl.Layout.parse(layout), **settings)


def suggested(message: str) -> dict[str, int]:
    """Sizes that a message names as flags."""
    flags = re.search(r"\((--[^)]*)\)", message)[1].split()
    return {name.removeprefix("--").replace("-", "_"): int(n) for name, n in zip(flags[::2], flags[1::2], strict=True)}


def test_a_state_that_does_not_fit_is_not_begun(free):
    mine = trainer()
    needed = 8 * bytes_per_device(mine.abstract_state)
    free(needed)
    room.check_state(mine)
    free(needed - 100)
    said = r"it takes on each of 8 devices 2\.57 MB .* for parameters, .* for optimizer state\), 20\.6 MB in all, and"
    with pytest.raises(ValueError, match=f"the training state does not fit in memory: {said}") as caught:
        mine.init()
    assert "_init" not in vars(mine)
    with pytest.raises(ValueError, match="does not fit in memory"):
        mine.fit([], 3)
    smaller = trainer(config=sl.presets.tiny(**suggested(str(caught.value))))
    assert 8 * bytes_per_device(smaller.abstract_state) < needed


def test_a_layout_that_splits_it_is_named_where_it_would_fit(monkeypatch):
    given = memory.Room(1_500_000, False, 8, "of a GPU that JAX may use")
    monkeypatch.setattr(room, "available", lambda devices: given)
    with pytest.raises(ValueError, match=r"by fsdp with zero=3 or by tensor, it would take 1\.28 MB on each"):
        room.check_state(trainer("data=8"))
    given = memory.Room(100_000, False, 8, "of a GPU that JAX may use")
    with pytest.raises(ValueError, match="at least 103 devices are needed, with fsdp and zero=3"):
        room.check_state(trainer("data=8"))


def test_a_module_of_the_user_s_is_refused_too(free):
    from flax import nnx

    def loss(module, batch):
        return (module(batch) ** 2).sum(), batch.shape[0]

    mine = sl.Trainer.from_module(lambda rngs: nnx.Linear(64, 64, rngs=rngs), loss, sl.Layout(data=8))
    free(1000)
    with pytest.raises(ValueError, match="the training state does not fit in memory"):
        mine.init()


def test_a_step_that_does_not_fit_is_refused_with_what_would(free):
    mine = trainer("data=8")
    free(1e9)
    with pytest.raises(
        ValueError, match=r"a step of 256 x 512 tokens does not fit in memory, as predicted: "
    ) as caught:
        room.check_step(mine, 256, 512)
    message = str(caught.value)
    assert "for activations kept for backward" in message and "1 GB free on this machine" in message
    layout = re.search(r"--layout (\S+)", message)[1]
    assert "remat=full" in layout
    room.check_step(trainer(layout, sl.presets.tiny(attention=sl.Attention(implementation="chunked"))), 256, 512)


def test_a_step_far_below_the_memory_is_not_traced(free, monkeypatch):
    mine = trainer()
    free(64e9)
    monkeypatch.setattr(room, "look_at", lambda *_: pytest.fail("traced"))
    room.check_step(mine, 16, 128)


@pytest.mark.parametrize("preset", ["llama3_8b", "gpt2", "gemma2_2b"])
@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "pipe=4,tensor=2,pipeline=interleaved:4:2"])
@pytest.mark.parametrize("share", [0.7, 0.2, 0.01])
def test_a_smaller_model_is_smaller_and_takes_the_layout(preset, layout, share):
    config, where = sl.presets.get(preset), sl.Layout.parse(layout)
    text = room.smaller(config, where, share)
    if not text:
        with pytest.raises(ValueError):
            where.check(config)
        return
    import dataclasses

    other = dataclasses.replace(config, **suggested(text))
    where.check(other)
    assert count_parameters(other) <= share * count_parameters(config)


def test_generation_counts_the_cache_and_not_what_is_there(free):
    layout = sl.Layout(data=2)
    params = sl.Trainer(CONFIG, layout, devices=jax.devices()[:2]).init().params
    free(10e6)
    with pytest.raises(ValueError, match=r"generation of .* does not fit in .* 205 MB for the cache, .*\(batch_size\)"):
        sl.generate(CONFIG, params, [[1, 2]], layout, max_length=100_000, devices=jax.devices()[:2])
    whole = jax.tree.map(np.asarray, params)
    free(2e6)
    with pytest.raises(ValueError, match=r"for parameters not there yet"):
        sl.generate(CONFIG, whole, [[1, 2]], layout, max_new_tokens=2, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"for parameters not there yet"):
        sl.score.loglikelihood(CONFIG, whole, [([1], [2])], layout, devices=jax.devices()[:2])


def test_a_hugging_face_folder_is_refused_before_it_is_read(free):
    free(100)
    with pytest.raises(ValueError, match=r"the model of .* does not fit in memory: it takes .* for parameters, and"):
        sl.load_hf(DATA / CASES[0])


@pytest.mark.parametrize("command", ["train --held-out 0", "verify"])
def test_the_command_line_says_it_before_the_run(command, free, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("a few words " * 4000)
    free(24e9)
    data = f" --data {tmp_path / 'a.txt'}" if command.startswith("train") else ""
    assert main(f"{command}{data} --preset llama3_8b --layout fsdp=8".split()) == 2
    error = capsys.readouterr().err
    assert "does not fit in memory: it takes" in error and "there are 24 GB free on this machine" in error
    assert "--num-layers" in error
