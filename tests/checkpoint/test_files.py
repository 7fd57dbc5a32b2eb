"""Checkpoints hold what was saved, bit for bit, on any layout; and say so when they do not."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from shardlm.checkpoint import Checkpoints, SaveError, digest, read_metadata, restore, rows, save, write

ROOT = Path(__file__).parents[2]
VOCAB = 11  # divides by nothing
TABLE = "embedding/table"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def grid(rows: int, columns: int) -> Mesh:
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def place(state, mesh: Mesh | None):
    """The abstract `state` with matrices split over both axes of `mesh`; all on the last device if there is none."""

    def sharding(leaf):
        if mesh is None:
            return SingleDeviceSharding(jax.devices()[-1])
        return NamedSharding(mesh, P("a", "b") if leaf.ndim == 2 and leaf.shape[0] % mesh.shape["a"] == 0 else P())

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), state)


def make_state(mesh: Mesh | None, vocab: int = 12, step: int = 3) -> State:
    """A state whose every leaf, moments included, holds values of its own; table rows from VOCAB on are zero."""
    params = {
        "embedding": {"table": jnp.zeros((vocab, 16))},
        "layers": {"kernel": jnp.zeros((3, 16, 8), jnp.bfloat16), "scale": jnp.zeros((7,))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.float32))
    abstract = jax.eval_shape(lambda: State(jnp.zeros((), jnp.int32), params, optimizer.init(params)))

    def fill(path, leaf):
        if leaf.ndim == 0:
            return np.full((), step, leaf.dtype)
        # The same first rows whatever the number of rows.
        generator = np.random.default_rng(list(jax.tree_util.keystr(path).encode()))
        values = generator.standard_normal(leaf.shape).astype(leaf.dtype)
        values.flat[:3] = [-0.0, np.inf, np.nan]
        if "table" in jax.tree_util.keystr(path):
            values[VOCAB:] = 0
        return values

    filled = jax.tree.map_with_path(fill, abstract)
    return jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), filled, place(abstract, mesh))


def padded(path: str, shape: tuple[int, ...]) -> int | None:
    return VOCAB if path.endswith(TABLE) else None


def assert_same(state, expected):
    """The same tree, dtypes, shapes and bits, NaN and the sign of zero included."""

    def same(path, x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path

    jax.tree.map_with_path(same, state, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, State]:
    """A checkpoint written from a 2 x 4 mesh, not to be changed, and its state."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    state = make_state(grid(2, 4))
    save(path, state, {"layout": "data=2,tensor=4", "data": {"epoch": 1, "position": [3, 5]}})
    return path, state


@pytest.mark.parametrize("shape", [(4, 2), (1, 8), (2, 4), None], ids=str)
def test_a_state_is_restored_bit_for_bit_onto_another_layout(saved, shape):
    path, state = saved
    target = place(state, None if shape is None else grid(*shape))
    restored = restore(path, target)
    assert_same(restored, state)
    assert isinstance(restored.opt_state[1][0], optax.ScaleByAdamState)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
    if shape == (4, 2):
        assert restored.params["embedding"]["table"].addressable_shards[0].data.shape == (3, 8)


def test_the_target_may_be_an_object_with_an_abstract_state(saved):
    path, state = saved

    class Trainer:
        abstract_state = place(state, grid(8, 1))

    assert_same(restore(str(path), Trainer()), state)


def test_a_target_without_shardings_is_refused(saved):
    path, state = saved
    with pytest.raises(ValueError, match=r"no sharding is given for step, params/embedding/table, "):
        restore(path, jax.eval_shape(lambda: state))


# Stored with 12 rows, 11 of them real; 11 on one device is less, 16 and 24 are more, and 12 do not divide by 8.
@pytest.mark.parametrize(("rows", "shape"), [(11, None), (16, (8, 1)), (24, (4, 2)), (12, (4, 2))], ids=str)
def test_a_padded_vocabulary_is_restored_with_other_padding_and_back(saved, tmp_path, rows, shape):
    path, state = saved
    mesh = None if shape is None else grid(*shape)
    expected = make_state(mesh, vocab=rows)
    repadded = restore(path, place(expected, mesh), rows=padded)
    assert_same(repadded, expected)
    assert repadded.params["embedding"]["table"].sharding == expected.params["embedding"]["table"].sharding
    save(tmp_path / "back", repadded)
    assert_same(restore(tmp_path / "back", place(state, grid(2, 4)), rows=padded), state)


def test_padding_that_is_not_zero_becomes_zero(tmp_path):
    stored = {"table": jnp.arange(1.0, 49).reshape(24, 2), "step": jnp.int32(1)}
    save(tmp_path / "c", stored)

    class Trainer:
        abstract_state = place({"table": jnp.zeros((16, 2)), "step": jnp.int32(0)}, grid(8, 1))

        def padded_rows(self, path, shape):
            return VOCAB if path == "table" else None

    restored = restore(tmp_path / "c", Trainer())
    np.testing.assert_array_equal(restored["table"][:VOCAB], stored["table"][:VOCAB])
    assert not restored["table"][VOCAB:].any()


def test_padding_is_changed_only_where_the_caller_says_so(saved):
    path, _ = saved
    target = place(make_state(None, vocab=16), grid(8, 1))
    with pytest.raises(ValueError, match=r"params/embedding/table: shape expected \(16, 16\), found \(12, 16\)"):
        restore(path, target)
    with pytest.raises(ValueError, match=r"expected \(16, 16\) with 13 real rows, found \(12, 16\)"):
        restore(path, target, rows=lambda path, shape: 13 if path.endswith(TABLE) else None)


def test_a_checkpoint_of_another_model_is_one_error_with_every_mismatch(saved):
    path, state = saved
    params = {
        "embedding": {"table": jnp.zeros((12, 15))},
        "layers": {"kernel": jnp.zeros((3, 16, 8), jnp.float32), "bias": jnp.zeros((8,), jnp.bfloat16)},
    }
    target = place(State(state.step, params, optax.sgd(0.1).init(params)), grid(2, 4))
    with pytest.raises(ValueError, match="is of another model or optimizer") as error:
        restore(path, target, rows=padded)
    lines = str(error.value).splitlines()
    assert lines[-1].endswith('are named by mapping= and ignore=; only="params" leaves the optimizer out')
    assert [line.strip() for line in lines[1:-1] if "opt_state" not in line] == [
        "params/embedding/table: shape expected (12, 15), found (12, 16)",
        "params/layers/bias: missing, expected bfloat16 (8,)",
        "params/layers/kernel: dtype expected float32, found bfloat16",
        "params/layers/scale: not expected float32 (7,)",
    ]
    assert sum("opt_state" in line for line in lines) == len(jax.tree.leaves(state.opt_state))


def test_metadata_is_json_that_is_read_without_a_device(saved):
    path, _ = saved
    metadata = {"layout": "data=2,tensor=4", "data": {"epoch": 1, "position": [3, 5]}}
    assert json.loads((path / "metadata.json").read_text())["metadata"] == metadata
    command = "import shardlm.checkpoint as c, sys; print(c.read_metadata(sys.argv[1]))"
    env = os.environ | {"JAX_PLATFORMS": "none"}  # starting a backend fails
    result = subprocess.run([sys.executable, "-c", command, path], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{metadata}\n", "")


@pytest.mark.parametrize("metadata", [{"x": jnp.ones(2)}, {"x": float("nan")}, ["x"]], ids=["array", "nan", "list"])
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata):
    with pytest.raises(ValueError, match="metadata must be a dict that JSON can hold"):
        save(tmp_path / "c", {"x": jnp.ones(2)}, metadata)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"a": {"x": 1}}, TypeError, "a/x: a state is made of jax.Arrays of numbers .* not int"),
        ({"x": np.ones(2)}, TypeError, "not ndarray float64"),
        ({"x": lambda: jnp.zeros((0, 3))}, ValueError, "no elements to save in x"),
        ({"x": None}, ValueError, "no elements to save in the whole state"),
        ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, ValueError, "a name in it contains a slash"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused(tmp_path, state, error, message):
    state = {name: leaf() if callable(leaf) else leaf for name, leaf in state.items()}
    with pytest.raises(error, match=message):
        save(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back_as_they_were(tmp_path, generator):
    state = {"keys": jax.random.split(jax.random.key(3, impl=generator), 2), "x": jnp.ones(2)}
    save(tmp_path / "c", state)
    found = restore(tmp_path / "c", state)
    assert found["keys"].dtype == state["keys"].dtype
    np.testing.assert_array_equal(jax.random.key_data(found["keys"]), jax.random.key_data(state["keys"]))
    numbers = jax.random.key_data(state["keys"])
    with pytest.raises(ValueError, match=f"keys: expected uint32, found keys of {generator}"):
        restore(tmp_path / "c", state | {"keys": numbers})
    save(tmp_path / "numbers", {"x": numbers})
    with pytest.raises(ValueError, match="x: expected keys .*, found numbers"):
        restore(tmp_path / "numbers", {"x": state["keys"]})


def test_parts_of_an_optimizers_state_with_another_shape_are_not_rearranged():
    """A factored moment of a parameter may have as many rows as its layers are stored in, by chance."""
    layouts = [(0, 1, 2, -1), (0, -1, 1, 2)]  # three layers in four rows
    arrays = {
        "params/layers/up": jax.ShapeDtypeStruct((4, 4, 8), jnp.float32),
        "opt_state/mu/layers/up": jax.ShapeDtypeStruct((4, 4, 8), jnp.float32),
        "opt_state/v_col/layers/up": jax.ShapeDtypeStruct((4, 8), jnp.float32),  # [embed, mlp]
    }
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[0]))
        for name, x in arrays.items()
    }
    found, problems = rows.changes(arrays, target, lambda path, shape: None, tuple(layouts))
    assert not problems
    assert sorted(found) == ["opt_state/mu/layers/up", "params/layers/up"]
    # Formerly such parts were stored as the layers were.
    before = arrays | {"opt_state/v_row/layers/up": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    after = target | {
        "opt_state/v_row/layers/up": jax.ShapeDtypeStruct(
            (3, 8), jnp.float32, sharding=target["params/layers/up"].sharding
        )
    }
    found, problems = rows.changes(before, after, lambda path, shape: None, tuple(layouts))
    assert not problems
    x = jnp.arange(32.0).reshape(4, 8)
    np.testing.assert_array_equal(found["opt_state/v_row/layers/up"].make(x), x[:3])


def test_saving_over_a_checkpoint_must_be_asked_for(tmp_path):
    path = tmp_path / "c"
    save(path, {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"/c already holds a checkpoint: choose another path, or pass overwrite=True"):
        save(path, {"x": jnp.ones(3)})
    save(path, {"x": jnp.ones(3)}, overwrite=True)
    assert restore(path, {"x": jnp.zeros(3)})["x"].tolist() == [1, 1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_saving_over_anything_else_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").touch()
    with pytest.raises(ValueError, match="notes exists and is not a checkpoint: choose a new path"):
        save(tmp_path / "notes", {"x": jnp.ones(3)}, overwrite=True)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", {"x": jnp.ones(3)})
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(5, {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"run exists and is not a checkpoint \(steps in .*/run: 5\)"):
        save(tmp_path / "run", {"x": jnp.ones(3)}, overwrite=True)


def test_saving_touches_nothing_beside_its_path(tmp_path):
    (tmp_path / "c.saving").mkdir()
    (tmp_path / "c.saving/thesis").touch()
    (tmp_path / "c.removed").write_text("?")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    for overwrite in (False, True):
        save(tmp_path / "c", {"x": jnp.ones(3)}, overwrite=overwrite)
    with pytest.raises(ValueError, match="/link is a symbolic link: give the path of the folder itself"):
        save(tmp_path / "link", {"x": jnp.ones(3)}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["c", "c.removed", "c.saving", "link"]
    assert os.listdir(tmp_path / "c.saving") == ["thesis"] and (tmp_path / "c.removed").read_text() == "?"


@pytest.mark.parametrize(
    ("path", "error"), [("", "path='' is empty"), ("gs://bucket/c", "path='gs://bucket/c' is an a")]
)
def test_every_function_refuses_what_is_no_local_path(path, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"x": jnp.ones(3)}
    for call in (
        lambda: save(path, state),
        lambda: save(path, state, overwrite=True),
        lambda: restore(path, state),
        lambda: read_metadata(path),
    ):
        with pytest.raises(ValueError, match=error):
            call()
    with pytest.raises(ValueError, match="checkpoints='.*' is "):
        Checkpoints(path)
    with pytest.raises(ValueError, match="/.* is the folder that the program runs in"):
        save(".", state)
    assert os.listdir(tmp_path) == []


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    target = {"x": jnp.zeros(3)}
    (tmp_path / "empty").mkdir()
    (tmp_path / "other/src").mkdir(parents=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*/nowhere: it does not exist$"):
        restore(tmp_path / "nowhere", target)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*/empty: it is empty$"):
        restore(tmp_path / "empty", target)
    for name in ("other", "file"):
        with pytest.raises(ValueError, match=rf"/{name} is not a checkpoint: it has no metadata.json$"):
            read_metadata(tmp_path / name)


def test_a_wrong_step_lists_those_there_are(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (20, 100):
            checkpoints.save(step, {"x": jnp.ones(3)})
        with pytest.raises(FileNotFoundError, match=r"/run/7: it does not exist \(steps in .*/run: 20, 100\)"):
            checkpoints.restore(7, {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"/run is not a checkpoint: .* \(steps in .*/run: 20, 100\)"):
        restore(tmp_path / "run", {"x": jnp.zeros(3)})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float32", "float64", "complex64"])
def test_digests_see_values_and_places_but_not_the_layout_or_zero_padding(dtype):
    x = np.random.default_rng(0).integers(0, 2, (16, 6)).astype(dtype)
    expected = int(digest.digest(x))
    assert int(digest.digest(jax.device_put(x, NamedSharding(grid(4, 2), P("a", "b"))))) == expected
    assert int(digest.digest(np.concatenate([x, np.zeros((5, 6), dtype)]))) == expected
    assert int(digest.digest(x[::-1])) != expected
    if dtype != "bool":
        assert int(digest.digest(x + np.array(0.5 if x.dtype.kind in "fcV" else 1, dtype))) != expected
    if dtype == "float32":  # two flips of the highest bit, which a plain weighted sum would let cancel
        y = x + 1
        assert int(digest.digest(np.where(np.arange(6) < 2, -y, y))) != int(digest.digest(y))


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    sharding = NamedSharding(grid(2, 4), P("a", "b"))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 100, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(3):
            state = {"w": jax.device_put(jnp.full((512, 512), step + 0.5), sharding), "step": jnp.int32(step)}
            checkpoints.save(step, state)
            overwritten = overwrite(state)
            del state
        jax.block_until_ready(overwritten)
        for step in range(3):
            assert (checkpoints.restore(step, overwritten)["w"] == step + 0.5).all()


def test_a_run_keeps_its_last_checkpoints_and_goes_on(tmp_path):
    target = {"x": jnp.zeros(3)}
    threads = set(threading.enumerate())
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.steps() == []
        assert not (tmp_path / "run").exists()
        for step in (1, 2, 30):
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, {"step": step})
            assert checkpoints.latest() == step
    (tmp_path / "run/31.saving").mkdir()  # somebody else's
    (tmp_path / "run/31.saving-0123abcd").mkdir()  # of a run that was killed at once
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([2, 30], 30)
        assert checkpoints.restore(30, target)["x"].tolist() == [30, 30, 30]
        assert checkpoints.metadata(2) == {"step": 2}
        assert (tmp_path / "run/31.saving-0123abcd").exists()  # a reader removes nothing
        for step in (-1, 29, 30):
            with pytest.raises(
                ValueError, match=rf"cannot save step {step} to .*/run \(steps in .*: 2, 30\): steps only"
            ):
                checkpoints.save(step, target)
        checkpoints.save(jnp.int32(31), target)
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == ["30", "31", "31.saving"]
    with pytest.raises(ValueError, match="keep=0: expected how many checkpoints stay, at least 1, or None"):
        Checkpoints(tmp_path, keep=0)
    deadline = time.monotonic() + 5  # idle workers of thread pools that were shut down need a moment to end
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) - threads == set()


def test_a_save_that_fails_in_the_background_raises_and_the_next_one_works(tmp_path, monkeypatch):
    def full(directory, names):
        raise OSError("No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(write, "digest_files", full)
            checkpoints.save(2, {"x": jnp.ones(3)})
            with pytest.raises(SaveError, match=f"{tmp_path}/2 could not be saved: OSError: No space left on device"):
                checkpoints.wait()
        assert checkpoints.latest() == 1
        checkpoints.save(2, {"x": jnp.ones(3)})
        assert checkpoints.latest() == 2


# Saves one step after the other for ever, each filled with its number. When it says k, step k - 2 is complete: saving
# k - 1 has waited for it.
RUN = """
import faulthandler, sys
faulthandler.dump_traceback_later(60, exit=True)
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from shardlm.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
fill = jax.jit(lambda n: [jnp.full((1 << 20,), n, jnp.float32)] * 4, out_shardings=jax.NamedSharding(mesh, P("a")))
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    step = checkpoints.latest() or 0
    if step:
        assert all((leaf == step).all() for leaf in checkpoints.restore(step, fill(0)))
    while True:
        step += 1
        print(step, flush=True)
        checkpoints.save(step, fill(step), {"step": step})
"""


def test_after_a_kill_the_last_complete_checkpoint_is_the_latest(tmp_path):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    target = [jnp.zeros(1 << 20)] * 4
    unfinished = latest = 0
    for seed in range(6):
        command = [sys.executable, "-c", RUN, tmp_path]
        with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1) as run:
            said = [int(run.stdout.readline() or run.kill() or -1) for _ in range(3)]
            time.sleep(random.Random(seed).uniform(0, 0.3))
            run.kill()
            out, err = run.stdout.read(), run.stderr.read()
        assert said[0] == latest + 1, err  # it went on where the one before was killed
        if seed == 0:
            assert err == ""  # no chatter in normal use
        last_said = int((out.split() or said)[-1])
        latest = Checkpoints(tmp_path).latest()
        assert last_said - 2 <= latest <= last_said
        assert all((leaf == latest).all() for leaf in restore(tmp_path / str(latest), target))
        assert read_metadata(tmp_path / str(latest)) == {"step": latest}
        unfinished += any(".saving-" in entry.name for entry in tmp_path.iterdir())
        if seed >= 2 and unfinished:
            break
    assert unfinished, "no kill hit a save: the test has shown nothing"
