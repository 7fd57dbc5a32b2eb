"""What code a process runs, in a few words that can be compared with those of its peers."""

import hashlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


def identity() -> dict[str, str]:
    """Versions, and digests of shardlm's sources and of the script; what differs between processes is a mistake."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    known = {"Python": ".".join(platform.python_version_tuple()[:2])}
    known |= {name: _version(name) for name in _PACKAGES}
    known["shardlm's sources"] = sources(Path(__file__).parents[1])
    if script is not None and script.is_file():
        known[f"the script {script.name}"] = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    return known


def sources(folder: Path) -> str:
    """A digest of all Python files of a folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
