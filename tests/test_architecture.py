"""The rules of the whole tree: who imports whom, what importing does, what is documented, how long files are."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "shardlm"
MAX_LINES = 400

# Layers from left to right. A file may import its own layer and every layer to the left of it; layers in one pair of
# parentheses do not import each other. The last two are the command line and see everything.
ORDER = (
    ("_text",),  # numbers of bytes, lines and tables as people read them
    # words: of arguments, options, dtypes, errors, extras, layouts
    ("_arguments", "_command_line", "_dtypes", "_errors", "_extras", "_layout_text", "_version"),
    ("_layout_table", "_placement", "_rules_table", "_pipeline"),  # what layout.py and rules.py print, hold and place
    ("layout",),
    ("dims",),
    ("rules",),
    ("collectives",),
    ("parallel",),
    ("models",),
    # inspect looks at programs, Trainer.explain hands it the step; runtime knows processes, and nothing of the model
    ("data", "checkpoint", "inspect", "runtime"),
    ("train",),
    ("verification", "hub"),
    ("generate",),
    ("bench",),
    ("__main__",),
)
INDEPENDENT = {"data", "checkpoint"}  # import nothing of shardlm but what is for all
FOR_ALL = {  # import nothing of shardlm but each other, and every layer may import them
    "shardlm._arguments",
    "shardlm._extras",
    "shardlm._text",
    "shardlm.runtime.strangers",
    "shardlm.runtime.paths",
    "shardlm.runtime.claims",
    "shardlm.runtime.folders",
}
SEE_THE_ROOT = {"bench", "__main__"}  # may write `import shardlm as sl`, which holds every layer
IMPORT_NAMES = {"orbax-checkpoint": "orbax"}  # distributions whose import name is not their own

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`shardlm/models/mlp.py` is `shardlm.models.mlp`, `shardlm/models/__init__.py` is `shardlm.models`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """The layer of a module of shardlm; the empty string is the root package, which holds them all."""
    return (module.split(".") + [""])[1]


def legal_layers(layer: str) -> set[str]:
    """The layers that files of `layer` may import."""
    if layer in INDEPENDENT:
        return {layer}
    [rank] = [rank for rank, group in enumerate(ORDER) if layer in group]
    return {layer} | {name for group in ORDER[:rank] for name in group} | ({""} if layer in SEE_THE_ROOT else set())


def shardlm_imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module of shardlm that is imported, inside functions too."""
    layers = {name for group in ORDER for name in group}
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*anchor, *filter(None, [node.module])])
            # `from shardlm import dims` is the module dims; `from shardlm import Layout` is the root package.
            names = (
                [f"{base}.{a.name}" if a.name in layers else base for a in node.names] if base == "shardlm" else [base]
            )
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "shardlm")


def import_violations(path: Path, source: str) -> list[str]:
    """Imports of `path` that the order forbids. The root's `__init__.py` re-exports every layer and is exempt."""
    where, layer = path.relative_to(ROOT), layer_of(module_of(path))
    if not layer:
        return []
    if not any(layer in group for group in ORDER):
        return [f"{where}: {layer!r} has no place in ORDER of {Path(__file__).name}: give it one"]
    legal = legal_layers(layer)
    return [
        f"{where}:{line} imports {name}: {layer} may import only {', '.join(sorted(legal - {layer, ''})) or 'itself'}"
        for line, name in shardlm_imports(ast.parse(source), path)
        if layer_of(name) not in legal and name not in FOR_ALL
    ]


def init_violations(path: Path, source: str) -> list[str]:
    """Statements of an `__init__.py` other than its docstring, imports and `__all__`."""
    body = ast.parse(source).body
    if body and ast.get_docstring(ast.Module(body, [])) is not None:
        body = body[1:]

    def re_exports(node: ast.stmt) -> bool:
        return isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        )

    where = path.relative_to(ROOT)
    return [f"{where}:{node.lineno} does more than re-export" for node in body if not re_exports(node)]


def undocumented(path: Path, source: str) -> list[str]:
    """Public functions, classes and methods without a docstring."""

    def public(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            decorators = [ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list]
            if "overload" in decorators or "setter" in decorators:  # documented where the name is first bound
                continue
            if not (ast.get_docstring(node) or "").strip():
                yield f"{path.relative_to(ROOT)}:{node.lineno} {prefix}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")

    return list(public(ast.parse(source).body, ""))


def undeclared_imports(path: Path, source: str, declared: set[str]) -> list[str]:
    """Packages imported when the module is, that installing shardlm without extras does not bring."""

    def at_import(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.lineno, "shardlm" if child.level else child.module or ""
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from at_import(child)

    legal = declared | set(sys.stdlib_module_names) | {"shardlm"}
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}, which no dependency brings: import it where it is used"
        for line, name in at_import(ast.parse(source))
        if name.split(".")[0] not in legal
    ]


def declared_dependencies() -> set[str]:
    """Import names of the dependencies in pyproject.toml, extras left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", requirement).group() for requirement in project["dependencies"]]
    return {IMPORT_NAMES.get(name, name) for name in names}


def violations(check, paths=FILES, *arguments) -> list[str]:
    """What `check` finds in all of `paths`."""
    return [found for path in paths for found in check(path, path.read_text(encoding="utf-8"), *arguments)]


# Imports all modules of a package in the working directory, and says which of them touched the environment and whether
# a backend started.
PROBE = """
import importlib, json, os, pathlib, sys

package, touched = sys.argv[1], []

def watch(name):
    original = getattr(os._Environ, name)
    def watched(environ, key, *rest):
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") in ("os", "collections.abc"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").split(".")[0] == package:
            touched.append(f"{frame.f_globals['__name__']}:{frame.f_lineno} {key}")
        return original(environ, key, *rest)
    setattr(os._Environ, name, watched)

for name in ("__getitem__", "__setitem__", "__delitem__"):
    watch(name)

for path in sorted(pathlib.Path(package).rglob("*.py")):
    if path.stem != "__main__":
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))

import jax

try:
    jax.config.update("jax_num_cpu_devices", 2)  # refused once a backend has started
    started = jax.device_count() != 2
except RuntimeError:
    started = True
print(json.dumps({"touched": touched, "started": started}))
"""


def probe(package: str, folder: Path) -> dict:
    """Runs PROBE on the package in `folder`, in a process of its own."""
    command = [sys.executable, "-c", PROBE, package]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_imports_follow_the_order():
    assert FILES, f"no Python file under {PACKAGE}"
    assert violations(import_violations) == []


@pytest.mark.parametrize("module", sorted(FOR_ALL))
def test_what_every_layer_may_import_imports_none(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    imported = {name for _, name in shardlm_imports(ast.parse(path.read_text(encoding="utf-8")), path)}
    assert imported <= FOR_ALL


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        ("layout.py", "import shardlm.dims", "shardlm.dims"),
        ("layout.py", "import shardlm.dims as d, os", "shardlm.dims"),
        ("dims.py", "from shardlm.models.mlp import MLP", "shardlm.models.mlp"),
        ("dims.py", "from shardlm import models", "shardlm.models"),
        ("dims.py", "from shardlm import Trainer", "shardlm"),
        ("dims.py", "from . import collectives", "shardlm.collectives"),
        ("collectives.py", "from .parallel import zero", "shardlm.parallel"),
        ("parallel/__init__.py", "from ..models import mlp", "shardlm.models"),
        ("parallel/pipeline/execute.py", "from ...train import step", "shardlm.train"),
        ("models/mlp.py", "def f():\n    from ..train import step", "shardlm.train"),
        ("models/mlp.py", "class A:\n    def f(self):\n        import shardlm", "shardlm"),
        ("models/decoder.py", "from shardlm.data import loader", "shardlm.data"),
        ("inspect/report.py", "from shardlm.train import trainer", "shardlm.train"),
        ("train/trainer.py", "import shardlm.verification", "shardlm.verification"),
        ("runtime/launcher.py", "from ..train import fit", "shardlm.train"),
        ("inspect/ledger.py", "from ..runtime import launcher", "shardlm.runtime"),
        ("checkpoint.py", "from .layout import Layout", "shardlm.layout"),
        ("data/text.py", "from shardlm.layout import Layout", "shardlm.layout"),
        ("bench/step.py", "from shardlm.__main__ import main", "shardlm.__main__"),
    ],
)
def test_a_forbidden_import_is_reported(path, source, imported):
    [message] = import_violations(PACKAGE / path, source)
    assert f"imports {imported}:" in message


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dims.py", "from .layout import Axis\nfrom shardlm.layout import Layout\nimport jax, inspect"),
        ("parallel/zero.py", "from . import tensor\nfrom .tensor import f\nfrom ..collectives import all_gather"),
        ("parallel/pipeline/__init__.py", "from .schedule import Schedule\nfrom ...collectives import shift"),
        ("train/trainer.py", "from shardlm import checkpoint\nfrom shardlm.data import loader\nfrom .. import models"),
        ("verification/run.py", "from ..train.trainer import Trainer"),
        ("checkpoint/command.py", "from shardlm._text import size"),
        ("bench/__main__.py", "import shardlm as sl\nfrom shardlm.inspect import ledger"),
        ("__main__.py", "import shardlm as sl\nfrom .bench import run\nfrom .runtime import launcher"),
        ("__init__.py", "from shardlm.layout import Layout\nfrom .train.trainer import Trainer"),
    ],
)
def test_a_legal_import_is_not_reported(path, source):
    assert import_violations(PACKAGE / path, source) == []


def test_the_textbook_asks_nobody_who_decides():
    """What a step has to send is stated from layout and sizes alone: else it would agree with any program."""
    legal = {"shardlm.layout", "shardlm.inspect.ledger", "shardlm.inspect.weights"}
    for name in ("theory", "weights"):
        path = PACKAGE / f"inspect/{name}.py"
        assert {found for _, found in shardlm_imports(ast.parse(path.read_text(encoding="utf-8")), path)} <= legal


def test_a_new_layer_must_be_placed():
    [message] = import_violations(PACKAGE / "planner.py", "import jax")
    assert "'planner' has no place in ORDER" in message


def test_init_files_only_re_export():
    assert violations(init_violations, [path for path in FILES if path.name == "__init__.py"]) == []


@pytest.mark.parametrize("statement", ["x = 1", "def f(): ...", "f()", "if x:\n    import y", "__all__ += ['z']"])
def test_an_init_file_that_does_more_is_reported(statement):
    source = f"'''Layers.'''\nfrom .mlp import MLP\n__all__ = ['MLP']\n{statement}"
    assert init_violations(PACKAGE / "models/__init__.py", source) == [
        "shardlm/models/__init__.py:4 does more than re-export"
    ]


def test_public_names_have_docstrings():
    assert violations(undocumented) == []


def test_a_missing_docstring_is_reported():
    source = """
class MLP:
    '''Two products with a nonlinearity between them.'''
    def __call__(self): ...
    def flops(self): ...
    @property
    def width(self): ...
    @width.setter
    def width(self, value): ...
async def gather(): ...
def _hidden(): ...
class _Hidden:
    def f(self): ...
"""
    found = undocumented(PACKAGE / "models/mlp.py", source)
    assert [message.split()[1] for message in found] == ["MLP.flops", "MLP.width", "gather"]


def test_exported_names_have_docstrings():
    import shardlm

    assert shardlm.__all__
    documented = {name: inspect.getdoc(getattr(shardlm, name)) or "" for name in shardlm.__all__}
    # A dataclass without a docstring is given its own signature for one.
    assert [name for name, text in documented.items() if not text or text.startswith(f"{name}(")] == []


def test_importing_starts_no_backend_and_leaves_the_environment_alone():
    assert probe("shardlm", ROOT) == {"touched": [], "started": False}


def test_a_module_that_starts_a_backend_or_reads_the_environment_is_reported(tmp_path):
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy/__init__.py").write_text("import os\nos.getenv('SHARDLM_LEVEL')\n'HOME' in os.environ\n")
    (tmp_path / "noisy/devices.py").write_text("import os, jax\njax.devices()\nos.environ['XLA_FLAGS'] = ''\n")
    assert probe("noisy", tmp_path) == {
        "touched": ["noisy:2 SHARDLM_LEVEL", "noisy:3 HOME", "noisy.devices:3 XLA_FLAGS"],
        "started": True,
    }


def test_importing_needs_no_extra():
    assert violations(undeclared_imports, FILES, declared_dependencies()) == []


def test_an_import_of_an_extra_is_reported():
    source = """
from typing import TYPE_CHECKING
import jax.numpy as jnp
from orbax import checkpoint
from . import layout
import safetensors.numpy
try:
    import tokenizers
except ImportError:
    tokenizers = None
if TYPE_CHECKING:
    import tensorboardX
def plot():
    import matplotlib.pyplot
class File:
    def open(self):
        import safetensors
"""
    found = undeclared_imports(PACKAGE / "models/hf.py", source, declared_dependencies())
    assert [message.split()[2] for message in found] == ["safetensors.numpy,", "tokenizers,"]


def test_files_are_short():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_test_folders_mirror_the_package():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")}
    assert [folder.as_posix() for folder in sorted(folders) if not (PACKAGE / folder).is_dir()] == []


def test_the_readme_says_how_ci_tests():
    [command] = [line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if "-m pytest" in line]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    readme = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert command in readme, f"README.md has no line that reads: {command}"
