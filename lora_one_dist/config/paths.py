"""Paths as a user writes them: ``~`` stands for a home, and the shell's variables for nothing.

In: a setting or an argument.  Out: the path, ``~`` expanded.  The standard library alone: the doctor uses it too.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[^}]*\})")


class PathError(ValueError):
    """A path that means nothing here: rule and remedy; whoever knows what was given puts that in front."""


def expanded(path: str) -> str:
    """``~/x`` and ``~name/x`` from the home.  Raises PathError for ``$NAME``, ``${NAME}`` and an unknown ``~name``."""
    variable = VARIABLE.search(path)
    if variable is not None:
        raise PathError(
            f"holds {variable[0]}, and only a shell knows such variables. Write its value out, or give the path on the "
            "command line without single quotes, where the shell puts the value in."
        )
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.partition("/")[0]
        raise PathError(f"{user} has no home here. Write the path out; of a name that begins with ~ write ./{user}.")
    return found


def argument(text: str) -> Path:
    """For ``argparse``: a path of the command line; no shell expands ``--out=~/x``."""
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """For ``argparse``: a path, or another name."""
    try:
        return expanded(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
