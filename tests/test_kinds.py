"""Another kind of thing than what belongs there is one error that says what it is and how to come by the right one."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlm as sl
from shardlm import _dtypes, _layout_text
from shardlm.__main__ import _parser, main
from shardlm._command_line import program
from shardlm.bench.__main__ import parser as bench_parser

CONFIG = sl.TransformerConfig(vocab_size=33, num_layers=1, d_model=8, num_heads=2, d_ff=8, vocab_multiple=1)
OTHER = sl.TransformerConfig(vocab_size=33, num_layers=2, d_model=8, num_heads=2, d_ff=8, vocab_multiple=1)
PACKAGE = Path(sl.__file__).parent


@pytest.fixture(scope="module")
def trainer():
    return sl.Trainer(CONFIG)


@pytest.fixture(scope="module")
def state(trainer):
    return trainer.init()


WRONG_CONFIGS = [
    ("tiny", "config is the string 'tiny', not a sl.TransformerConfig: a preset's name goes to sl.presets.get('tiny')"),
    (
        {"vocab_size": 3},
        "config is a dict, not a sl.TransformerConfig: make one of the values: sl.TransformerConfig(**",
    ),
    (
        CONFIG.to_dict(),
        "config is a dict, not a sl.TransformerConfig: make one of the values: sl.TransformerConfig.from_",
    ),
    (sl.presets.tiny, "config is the function tiny, not a sl.TransformerConfig: call it: tiny()"),
    (sl.TransformerConfig, "config is the class TransformerConfig, not a sl.TransformerConfig: make one"),
    (sl.Layout(data=2), "config is a Layout, not a sl.TransformerConfig: as sl.presets.tiny() makes one"),
    (None, "config is None, not a sl.TransformerConfig"),
]


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS, ids=lambda value: type(value).__name__)
def test_what_is_no_configuration(config, message, tmp_path):
    params = {"x": jnp.ones(2)}
    calls = [
        lambda: sl.Trainer(config),
        lambda: sl.Trainer(config, "data=2"),
        lambda: sl.Transformer(config, rngs=nnx.Rngs(0)),
        lambda: sl.generate(config, params, [[1]]),
        lambda: sl.score.loglikelihood(config, params, [([1], [2])]),
        lambda: sl.save_hf(tmp_path / "a", config, params),
        lambda: sl.save_lora(tmp_path / "a", config, params),
        lambda: sl.load_lora(tmp_path / "a", config, params),
        lambda: sl.add_lora(config, params, sl.Lora(rank=2)),
        lambda: sl.merge_lora(config, params),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            call()
    with pytest.raises(TypeError, match=re.escape(message.removeprefix("config "))):
        sl.verify(config, "data=2")


def test_what_is_no_parameters(trainer, state, tmp_path):
    wrong = [
        (state, "params is a TrainState; give the TrainState's own: .params"),
        (trainer, "params is a Trainer; "),
        ((CONFIG, state.params, None), "params is a tuple; sl.load_hf returns (config, params, tokenizer)"),
        (None, "params is None; it is the nested dict of arrays that state.params is"),
        ("runs/a", "params is the string 'runs/a'; "),
    ]
    for params, message in wrong:
        calls = [
            lambda params=params: sl.generate(CONFIG, params, [[1]]),
            lambda params=params: sl.save_hf(tmp_path / "a", CONFIG, params),
            lambda params=params: sl.save_lora(tmp_path / "a", CONFIG, params),
            lambda params=params: sl.add_lora(CONFIG, params, sl.Lora(rank=2)),
            lambda params=params: sl.merge_lora(CONFIG, params),
            lambda params=params: sl.adapters(params),
        ]
        calls += [lambda params=params: trainer.init(params)] if params is not None else []
        for call in calls:
            with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
                call()
    with pytest.raises(TypeError, match="^lora is a dict, not a sl.Lora"):
        sl.add_lora(CONFIG, state.params, {"rank": 8})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.adam, "optimizer is the function adam, not an Optax transformation: call it: adam(1e-3)"),
        (sl.adamw, "optimizer is the function adamw, not an Optax transformation: call it: adamw(1e-3, steps=1000)"),
        ("adam", "optimizer is the string 'adam', not an Optax transformation: make one: optax.adam(1e-3)"),
        (1e-3, "optimizer is a float, not an Optax transformation: as optax.adam(1e-3)"),
        (optax.GradientTransformation, "optimizer is the class GradientTransformation, not an Optax transformation"),
        (
            optax.constant_schedule(1e-3),
            "optimizer is the function <lambda>, not an Optax transformation: a schedule goes",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_is_no_optimizer(optimizer, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        sl.Trainer(CONFIG, None, optimizer)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        sl.Trainer.from_module(lambda rngs: nnx.Linear(2, 2, rngs=rngs), lambda m, b: (m(b).sum(), 1), None, optimizer)


def test_what_is_no_state(trainer, state):
    batch = sl.data.batch(np.arange(8)[None])
    wrong = [
        (state.params, "state is a dict, not a sl.TrainState: parameters alone are no state: trainer.init(params)"),
        ((state, {}), "state is a tuple, not a sl.TrainState: trainer.step returns two things: state, metrics ="),
        (None, "state is None, not a sl.TrainState: trainer.init() makes one"),
        ("runs/a", "state is the string 'runs/a', not a sl.TrainState: sl.restore(path, trainer) reads one"),
        (trainer, "state is a Trainer, not a sl.TrainState"),
    ]
    for given, message in wrong:
        calls = [
            lambda given=given: trainer.step(given, batch),
            lambda given=given: trainer.loss_and_grads(given, batch),
            lambda given=given: trainer.evaluate(given, [batch]),
            lambda given=given: sl.sample(trainer, given, np.array([1]), tokens=1, window=4),
        ]
        calls += [lambda given=given: trainer.fit([batch], 1, state=given)] if given is not None else []
        for call in calls:
            with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
                call()


def test_a_state_of_another_model(state):
    other = sl.Trainer(OTHER)
    with pytest.raises(ValueError, match=r"of another model than the trainer: layers/.*: \(1, .*, expected \(2, "):
        other.step(state, sl.data.batch(np.arange(8)[None]))


def test_batches_of_another_kind(trainer):
    data = sl.data.load([sl.data.Document("a", "to be " * 40)], "bytes", 8, 2)
    with pytest.raises(TypeError, match="trainer is a dict, not a sl.Trainer"):
        sl.sample({}, None, np.array([1]), tokens=1, window=4)
    with pytest.raises(TypeError, match="batches is data of sl.data.load, .* give data.train"):
        trainer.fit(data, 1)
    with pytest.raises(TypeError, match=r"batch: a ndarray; it is a dict of arrays.*sl.data.batch\(tokens\) makes one"):
        trainer.place(np.zeros((2, 8), np.int32))


def test_what_is_saved_and_what_it_is_restored_onto(trainer, tmp_path):
    for state, message in (("a", "state: a state is made of jax.Arrays"), (trainer, "state: a state is made of")):
        with pytest.raises(TypeError, match=message):
            sl.save(tmp_path / "a", state)
    for target in (CONFIG, None, "trainer", {}):
        with pytest.raises(TypeError, match="target is .*; it is a sl.Trainer, or a pytree of jax.ShapeDtypeStructs"):
            sl.restore(tmp_path / "a", target)


LAYOUT = "fsdp=4,tensor=2"


def test_a_layout_is_taken_as_text_wherever_one_is():
    assert sl.Trainer(CONFIG, "tensor=2,fsdp=-1", devices=8).layout == sl.Layout(fsdp=4, tensor=2)
    module = lambda rngs: nnx.Linear(8, 8, rngs=rngs)  # noqa: E731
    made = sl.Trainer.from_module(module, lambda m, b: (m(b).sum(), 1), "fsdp=-1", devices=8)
    assert made.layout == sl.Layout(fsdp=8)
    rules = [(".*", P(None, "tensor"))]
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}
    assert sl.match_rules(shapes, rules, LAYOUT).splits.keys() == {"kernel"}
    assert sl.Layout.of(LAYOUT) == sl.Layout.of(sl.Layout(fsdp=4, tensor=2))
    assert sl.Layout.of(None) == sl.Layout()


@pytest.mark.parametrize(
    "layout",
    [8, {"data": 2}, sl.Layout, (2, 4), CONFIG],
    ids=lambda layout: getattr(layout, "__name__", None) or str(layout),
)
def test_what_is_no_layout(layout, state, tmp_path):
    for call in (
        lambda: sl.Trainer(CONFIG, layout),
        lambda: sl.verify(CONFIG, layout),
        lambda: sl.generate(CONFIG, state.params, [[1]], layout),
        lambda: sl.match_rules({"a": jax.ShapeDtypeStruct((8,), "float32")}, None, layout),
    ):
        with pytest.raises(
            TypeError, match=r"^layout is .*; give a sl.Layout, as in sl.Layout\(data=2, tensor=4\), or"
        ):
            call()


def test_text_that_is_no_layout_is_the_parsers_error(state):
    for call in (lambda: sl.Trainer(CONFIG, "dp=2"), lambda: sl.generate(CONFIG, state.params, [[1]], "dp=2")):
        with pytest.raises(sl.LayoutError, match="unknown setting 'dp': did you mean 'data'?"):
            call()


@pytest.mark.parametrize("ours", _layout_text.ELSEWHERE)
def test_what_others_call_a_setting_is_told_its_name(ours):
    names = _layout_text.ELSEWHERE[ours].split()
    assert ours in {field for field in sl.Layout.__dataclass_fields__}
    for name in [*names, names[0].upper(), names[0].replace("_", "-")]:
        with pytest.raises(sl.LayoutError, match=f"unknown setting '{name}': did you mean '{ours}'?"):
            sl.Layout.parse(f"{name}=2")


def test_no_name_is_two_settings():
    names = [name for names in _layout_text.ELSEWHERE.values() for name in names.split()]
    assert len(names) == len(set(names)) and not set(names) & set(sl.Layout.__dataclass_fields__)


@pytest.mark.parametrize(("short", "full"), _dtypes.SHORT.items())
def test_a_dtype_has_two_names(short, full):
    config = sl.TransformerConfig(vocab_size=3, num_layers=1, d_model=8, num_heads=2, dtype=short, param_dtype=short)
    assert (config.dtype, config.param_dtype) == (full, full)
    assert config == sl.TransformerConfig(
        vocab_size=3, num_layers=1, d_model=8, num_heads=2, dtype=jnp.dtype(full), param_dtype=getattr(jnp, full)
    )
    hardware = sl.inspect.Hardware(
        name="mine", flops={short: 1e12}, memory=1e9, memory_bandwidth=1e9, fast_bandwidth=1e9, domain=None,
        slow_bandwidth=1e9,
    )  # fmt: skip
    assert hardware.peak(short) == hardware.peak(full) == 1e12


def test_a_trainer_shows_what_it_is():
    assert repr(sl.Trainer(CONFIG, LAYOUT, devices=8)) == (
        "Trainer(1 layers, d_model 8, 2 heads (2 kv) of 4, d_ff 8, vocabulary 33: 1,000 parameters; "
        "layout fsdp=4,tensor=2 on 8 devices that need not exist; manual engine)"
    )
    assert "layout data=1 on 1 x cpu; auto engine)" in repr(sl.Trainer(CONFIG, engine="auto"))
    made = sl.Trainer.from_module(lambda rngs: nnx.Linear(2, 2, rngs=rngs), lambda m, b: (m(b).sum(), 1))
    assert "Linear: 6 parameters" in repr(made)


def test_the_version_is_one(capsys):
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", sl.__version__)
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"shardlm {sl.__version__}, jax {jax.__version__}, Python 3.")


def test_the_console_script_and_the_version_are_what_pyproject_says():
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    module, function = settings["project"]["scripts"]["shardlm"].split(":")
    assert getattr(importlib.import_module(module), function).__doc__
    assert settings["project"]["dynamic"] == ["version"]
    assert (
        f'__version__ = "{sl.__version__}"'
        in (PACKAGE.parent / settings["tool"]["hatch"]["version"]["path"]).read_text()
    )


# The command line


def _commands(parser, name="") -> dict:
    """Every parser below one, by the words that lead to it."""
    found = {name: parser}
    for action in parser._actions:
        for word, inner in (action.choices or {}).items() if hasattr(action, "_name_parser_map") else ():
            found |= _commands(inner, f"{name} {word}".strip())
    return found


COMMANDS = _commands(_parser()) | {f"bench {name}": parser for name, parser in _commands(bench_parser()).items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_taken_by_their_whole_names_alone(name, capsys):
    parser = COMMANDS[name]
    assert not parser.allow_abbrev
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and len(option) > 4 and option[:-1] not in parser._option_string_actions:
                with pytest.raises(SystemExit):
                    parser.parse_known_args([option[:-1], "1"])
    capsys.readouterr()


def test_an_option_that_is_none_is_told_its_like(capsys):
    for words, message in (
        ("train --step 100", "--step 100 (did you mean --steps?)"),
        ("explain --layout fsdp=2 --batch 3", "--batch 3 (did you mean --batch-size?)"),
    ):
        with pytest.raises(SystemExit):
            main(words.split())
        assert f"unrecognized arguments: {message}" in capsys.readouterr().err


def test_every_parser_is_made_in_one_place():
    made = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                made.append(path.name)
    assert made == []


def test_the_lines_that_install_extras_are_made_in_one_place():
    lines = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"pip install|shardlm\[", path.read_text(encoding="utf-8"))
    }
    assert lines == {"_extras.py"}
    for notebook in (PACKAGE.parent / "notebooks").glob("*.ipynb"):
        assert "shardlm[" not in notebook.read_text(encoding="utf-8"), notebook.name


@pytest.mark.parametrize(
    ("started", "found", "said"),
    [
        ("/x/.venv/bin/shardlm", "/x/.venv/bin/python", "shardlm"),
        ("/x/shardlm/__main__.py", "/x/.venv/bin/python", "python -m shardlm"),
        ("/x/shardlm/__main__.py", "/usr/bin/python", ".venv/bin/python -m shardlm"),
        ("/x/shardlm/__main__.py", None, ".venv/bin/python -m shardlm"),
    ],
)
def test_commands_are_said_so_that_they_can_be_typed(started, found, said, monkeypatch):
    monkeypatch.setattr("sys.argv", [started])
    monkeypatch.setattr("sys.executable", "/x/.venv/bin/python")
    monkeypatch.setattr("shutil.which", lambda name: found)
    monkeypatch.setattr("os.getcwd", lambda: "/x")
    assert program() == said
    assert _parser().prog == said
    monkeypatch.setattr("os.getcwd", lambda: "/y")
    assert program().startswith(("/x/.venv/bin/python", "python", "shardlm"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("explain --layout fsdp=-1", "fsdp=-1 is not filled yet: say with --devices how many there are"),
        ("explain --layout fsdp=4 --devices 8", "fsdp=4 = 4 devices, but there are 8, as --devices says: leave"),
        ("explain --layout tp=4", "unknown setting 'tp': did you mean 'tensor'?"),
        ("train --held-out 0.1 a.txt", "give one fraction, or files and folders"),
        ("train --held-out README.md --data a.jsonl", "--held-out README.md is text, and --data examples (.jsonl)"),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_command_line(words, message, capsys):
    try:
        status = main(words.split())
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
