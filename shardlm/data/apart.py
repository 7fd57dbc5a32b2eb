"""No file is read twice, and nothing that is held out is trained on: both would be wrong without a sign of it."""

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

_SHOWN = 5


def check_once(files: Iterable[str | os.PathLike], *, hard_links: bool) -> None:
    """Raise ValueError where a file comes up twice, by one name, by two, or by a link.

    Args:
        files: that are to be read, and exist.
        hard_links: whether two names of one file are one file. Some systems keep all equal files of a folder so.
    """
    seen: dict[Any, list[str]] = {}
    for file in files:
        status = os.stat(file)
        one = (status.st_dev, status.st_ino) if hard_links and status.st_ino else os.path.realpath(file)
        seen.setdefault(one, []).append(str(file))
    if twice := sorted(" and ".join(dict.fromkeys(names)) for names in seen.values() if len(names) > 1):
        rest = f" and {len(twice) - _SHOWN} more" if len(twice) > _SHOWN else ""
        raise ValueError(
            f"{len(twice)} file(s) would be read twice: {', '.join(twice[:_SHOWN])}{rest}; name each file or folder "
            "once"
        )


def check_apart(train: Sequence[str], held_out: Sequence[str], what: str, given: tuple[Any, Any]) -> None:
    """Say where texts that are held out are trained on too.

    Args:
        train, held_out: the texts; empty ones do not count.
        what: they are, for the message.
        given: where they are from, as the user gave it.

    Raises:
        ValueError: all of those held out are trained on.

    Warns where some are.
    """
    known = {text for text in train if text}
    counted = [text for text in held_out if text]
    both = sum(text in known for text in counted)
    if both and both == len(counted):
        raise ValueError(
            f"all {both} {what} of held_out={given[1]!r} are trained on as well, so their loss would say nothing: hold "
            "out others, or a fraction, or nothing (held_out=0)"
        )
    if both:
        warnings.warn(
            f"{both} of the {len(counted)} {what} held out are trained on as well: their loss says less than it seems",
            stacklevel=4,
        )
