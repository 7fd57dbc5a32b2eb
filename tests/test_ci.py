"""`.ci/run` tests the checkout in a folder called shardlm, whatever its own is called, and ends as the tests do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A python3 whose environments hold a pip that installs nothing, and a Python that says where it is and ends with 7.
PYTHON = f"""#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\n' > "$3/bin/pip"
    printf '#!/bin/sh\\necho "ran $*" in "$PWD" with $(ls -A)\\nexit 7\\n' > "$3/bin/python"
    chmod +x "$3/bin/pip" "$3/bin/python"
else
    exec "{sys.executable}" "$@"
fi
"""


@pytest.mark.parametrize("name", ["shardlm", "main", "a folder", "shardlm-0.1"])
def test_it_runs_in_a_folder_of_that_name_and_leaves_none_behind(tmp_path, name):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    checkout, temporary = tmp_path / name, tmp_path / "temporary"
    for folder in (".ci", ".git", ".venv/bin", "shardlm/parallel", "shardlm/__pycache__", "runs/a"):
        (checkout / folder).mkdir(parents=True)
    temporary.mkdir()
    shutil.copy(ROOT / ".ci/run", checkout / ".ci/run")
    (checkout / "pyproject.toml").touch()
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(temporary)}
    done = subprocess.run([checkout / ".ci/run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    said = done.stdout.splitlines()[-1]
    where = said.partition(" in ")[2].partition(" with ")[0]
    assert said.startswith("ran -m pytest in ") and Path(where).name == "shardlm"
    if name == "shardlm":
        assert where == str(checkout)
    else:
        assert Path(where).parent.parent == temporary
        assert said.partition(" with ")[2].split() == [".ci", ".venv", "pyproject.toml", "shardlm"]
    assert list(temporary.iterdir()) == []
