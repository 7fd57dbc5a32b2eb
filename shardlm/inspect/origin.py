"""Whose code a line of a traceback is: ours, a library's, or the user's; told by the folders that packages are in.

Where a checkout, an environment or a project happens to be says nothing: a clone called `shardlm` with its environment
inside has "/shardlm/" in the path of every file of JAX, and a project of any name may have files called as ours are.
"""

import functools
import importlib.util
import sysconfig
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1].as_posix()
# What stands between a model and JAX: its lines say how, and the model's what for.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "chex", "einops", "jaxtyping", "absl")
_INSTALLED = ("site-packages", "dist-packages")  # names of folders of packages: of Python, and of Debian
# The lines of these say how one communicates; what is asked for is who calls them.
_HELPERS = ("collectives.py", "parallel/", "models/kernel.py")


def asked_for(frames: Iterable[tuple[str, int]], package: str = PACKAGE) -> tuple[str | None, str | None]:
    """The line that asked for an operation, and the nearest that says how it communicates; None where there is none.

    The first is the nearest line, from the inside out, that is neither a library's nor a helper's of `package`. Where a
    model comes from an installed package of others, whose lines stand inside ours, it is that package's.

    Args:
        frames: (file, line) of a traceback, the innermost first.
        package: the folder of shardlm.
    """
    helper = installed = None
    for file, line in frames:
        name = file.replace("\\", "/")
        if name.startswith(f"{package}/"):
            path = name[len(package) + 1 :]
            if not path.startswith(_HELPERS):
                return installed or f"{path}:{line}", helper
            helper = helper or f"{path}:{line}"
        elif not name.startswith(("<", *_libraries())):
            where = f"{name.rpartition('/')[2]}:{line}"
            among = next((f"/{folder}/" for folder in _INSTALLED if f"/{folder}/" in name), None)
            if among is None and not name.startswith(_standard_library()):
                return where, helper
            if among is not None and name.rpartition(among)[2].partition("/")[0] not in _LIBRARIES:
                installed = installed or where
    return installed, helper


@functools.cache
def _libraries() -> tuple[str, ...]:
    """The folders of the libraries, which need not be among other packages: of a source checkout, or on PYTHONPATH."""
    specs = [importlib.util.find_spec(name) for name in _LIBRARIES]
    places = [place for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]
    return tuple(f"{Path(place).as_posix()}/" for place in places)


@functools.cache
def _standard_library() -> tuple[str, ...]:
    return tuple(f"{Path(sysconfig.get_path(name)).as_posix()}/" for name in ("stdlib", "platstdlib"))
