"""Regular expressions out of files of strangers: those whose matching may take for ever are refused.

Python's `re` goes back and tries again: where a repeated group holds a repetition or alternatives, as in `(a+)+b`, the
tries double with each letter, and many repetitions one after another multiply them. Names of modules need neither.
"""

import re

_MOST_REPEATS = 4  # one after another: of names of 100 letters at most some millions of tries
_MOST_LETTERS = 4000
_REPEAT = re.compile(r"[*+]|\{\d*(?:,\d*)?\}")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled expression.

    Raises:
        ValueError: it is none; or its matching may take too long.
    """
    if len(pattern) > _MOST_LETTERS:
        raise ValueError(f"it has {len(pattern):,} letters; at most {_MOST_LETTERS:,} are taken")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if re.search(r"\\[1-9]|\(\?P=", pattern):
        raise ValueError("a reference back to a group, with which matching may take for ever: write the group again")
    if _repeats(pattern) > _MOST_REPEATS:
        raise ValueError(
            f"more than {_MOST_REPEATS} repetitions (*, +, {{n,m}}) one after another, with which matching may take "
            "for ever: write the names themselves"
        )
    return compiled


def _repeats(pattern: str) -> int:
    """The most repetitions along one way through a legal expression; raises ValueError for a repeated group of some."""
    # For each open group: the most along its finished alternatives, along this one, and whether it has several.
    groups, last, at = [[0, 0, False]], (0, False), 0
    while at < len(pattern):
        if pattern[at] == "\\":
            last, at = (0, False), at + 2
        elif pattern[at] == "[":
            # A bracket that comes first, perhaps after ^, is a letter.
            end = pattern.index("]", at + 2 + (pattern[at + 1 : at + 2] == "^"))
            while pattern[:end].endswith("\\") and not pattern[:end].endswith("\\\\"):
                end = pattern.index("]", end + 1)
            last, at = (0, False), end + 1
        elif pattern[at] == "(":
            groups.append([0, 0, False])
            last, at = (0, False), at + (3 if pattern[at + 1 : at + 3] == "?:" else 1)
        elif pattern[at] == "|":
            best, now, _ = groups[-1]
            groups[-1], last, at = [max(best, now), 0, True], (0, False), at + 1
        elif pattern[at] == ")":
            best, now, several = groups.pop()
            groups[-1][1] += max(best, now)
            groups[-1][2] = groups[-1][2] or several
            last, at = (max(best, now), several), at + 1
        elif repeat := _REPEAT.match(pattern, at):
            if last[0] or last[1]:
                raise ValueError(
                    f"a repeated group that holds repetitions or alternatives, before letter {at + 1}, with which "
                    "matching may take for ever: write the names themselves"
                )
            groups[-1][1] += 1
            last, at = (0, False), repeat.end()
            at += pattern[at : at + 1] in ("?", "+")  # how greedy it is
        else:
            last, at = (0, False), at + 1
    return max(groups[0][:2])
