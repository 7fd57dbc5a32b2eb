"""The line that installs what an extra brings: errors that miss a package end in it, and no other file writes one."""


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, as an error about a missing package ends.

    Example:
        >>> install("hf")
        "pip install -e '.[hf]' (in the folder of shardlm's pyproject.toml)"
    """
    return f"pip install -e '.[{extra}]' (in the folder of shardlm's pyproject.toml)"
