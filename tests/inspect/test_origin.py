"""A line is told for ours, a library's or the user's by the packages' own folders, wherever a checkout is."""

import sysconfig
from pathlib import Path

import jax
import pytest

from shardlm.inspect import origin

JAX = "jax/_src/api.py"
CLONE = "/home/x/shardlm"
VENV = f"{CLONE}/.venv/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    ("package", "inside", "outside"),
    [
        (f"{CLONE}/shardlm", VENV, f"{CLONE}/train.py"),  # what `git clone` and the README make
        (f"{VENV}/shardlm", VENV, f"{CLONE}/train.py"),  # installed in a project that is called shardlm
        ("/srv/a/shardlm/shardlm/shardlm", "/srv/a/shardlm/shardlm/.venv/lib/site-packages", "/srv/a/shardlm/run.py"),
        (
            "/usr/lib/python3/dist-packages/shardlm",
            "/usr/lib/python3/dist-packages",
            "/home/ada/shardlm/models/mine.py",
        ),
        ("/opt/site-packages/shardlm", "/opt/site-packages", "/home/x/collectives.py"),
    ],
)
def test_no_folder_s_name_decides(package, inside, outside):
    libraries = [(f"{inside}/{JAX}", 5), (f"{inside}/flax/nnx/module.py", 6), ("<string>", 7)]
    ours = [(f"{package}/models/attention.py", 12), (f"{package}/train/step.py", 13)]
    assert origin.asked_for([*libraries, *ours, (outside, 1)], package) == ("models/attention.py:12", None)
    assert origin.asked_for([*libraries, (outside, 1)], package) == (f"{Path(outside).name}:1", None)
    helper = (f"{package}/parallel/tensor.py", 8)
    assert origin.asked_for([*libraries, helper, *ours], package) == ("models/attention.py:12", "parallel/tensor.py:8")
    assert origin.asked_for([*libraries, helper, (outside, 1)], package)[0] == f"{Path(outside).name}:1"
    assert origin.asked_for(libraries, package) == (None, None)


def test_a_user_s_file_named_as_a_helper_is_the_user_s():
    frames = [(f"{VENV}/{JAX}", 1), (f"{CLONE}/parallel/mine.py", 2), (f"{CLONE}/collectives.py", 3)]
    assert origin.asked_for(frames, f"{VENV}/shardlm") == ("mine.py:2", None)


def test_an_installed_model_of_others_is_named_where_it_stands_in_our_loss():
    package = f"{VENV}/shardlm"
    frames = [(f"{VENV}/{JAX}", 1), (f"{VENV}/einops/einops.py", 2), (f"{VENV}/theirs/model.py", 3)]
    assert origin.asked_for([*frames, (f"{package}/train/module.py", 4)], package)[0] == "model.py:3"
    assert origin.asked_for([*frames, ("/home/x/mine.py", 4)], package)[0] == "mine.py:4"


def test_libraries_outside_of_site_packages_are_libraries():
    jax_file = f"{Path(jax.__file__).parent}/_src/api.py"
    standard = f"{sysconfig.get_path('stdlib')}/contextlib.py"
    assert origin.asked_for([(jax_file, 1), (standard, 2), ("/home/x/train.py", 3)]) == ("train.py:3", None)


def test_paths_of_windows_have_the_same_parts():
    frames = [(r"C:\x\.venv\Lib\site-packages\jax\_src\api.py", 1), (r"C:\x\shardlm\models\mlp.py", 2)]
    assert origin.asked_for(frames, "C:/x/shardlm") == ("models/mlp.py:2", None)


def test_the_package_s_folder_is_where_it_was_imported_from():
    assert (Path(origin.PACKAGE) / "inspect/origin.py").samefile(origin.__file__)
