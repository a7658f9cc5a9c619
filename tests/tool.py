"""A tool of tools/ run as its user does, but in this process: importing torch takes seconds."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass
class Done:
    """What a tool printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run(name: str, *arguments: object, check: bool = True) -> Done:
    """``tools/<name>.py`` with these arguments; with ``check`` it must succeed."""
    script = Path(__file__).parent.parent / "tools" / f"{name}.py"
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [str(script), *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            code = int(left.code or 0)
    done = Done(code, out.getvalue(), err.getvalue())
    assert not check or code == 0, done.stderr
    return done
