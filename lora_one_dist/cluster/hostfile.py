"""The hostfile on a launcher's command line: deepspeed goes on with one host where it is not there.

In: a command line, or those of the processes above this one.  Out: nothing, or a LaunchError.  Not collective.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import psutil

from lora_one_dist.cluster.launchers import LaunchError

DEEPSPEED = ("deepspeed", "ds", "deepspeed.launcher.runner")  # the command, or python -m
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def refuse_bad(hostfile: Path) -> None:
    """Raise LaunchError for a hostfile that is not there, or whose first host would have another name."""
    if not hostfile.is_file():
        raise LaunchError(
            f"--hostfile {hostfile}: no such file; deepspeed would go on with this host alone. Correct the path, or "
            "leave --hostfile out if this host alone is meant."
        )
    with hostfile.open("rb") as file:
        if file.read(3).startswith(BYTE_ORDER_MARKS):
            raise LaunchError(
                f"--hostfile {hostfile}: begins with a byte-order mark, which launchers take for a part of the first "
                "host's name. Save it as UTF-8 without one."
            )


def refuse_bad_given(command: Sequence[str], folder: Path) -> None:
    """Raise LaunchError if a launcher's command line, started in ``folder``, names a bad hostfile."""
    given = hostfile_of(command)
    if given is not None:
        refuse_bad(folder / given)


def refuse_bad_above() -> None:
    """Raise LaunchError if the deepspeed that started this process, on this host, was given a bad hostfile."""
    try:
        commands = [(process.cmdline(), process) for process in psutil.Process().parents()]
        found = next((held for held in commands if _is_deepspeed(held[0])), None)
        folder = Path(found[1].cwd()) if found is not None else Path()
    except psutil.Error:  # another user's, or gone: nothing to be seen
        return
    if found is not None:
        refuse_bad_given(found[0], folder)


def hostfile_of(command: Sequence[str]) -> str | None:
    """What a launcher's command line says before the script that it starts.  Pure."""
    names = ("--hostfile", "-H") if _is_deepspeed(command) else ("--hostfile",)  # mpirun's -H are hosts
    for at, argument in enumerate(command):
        if argument.endswith(".py") and at > 0:
            break
        if argument in names:
            return next(iter(command[at + 1 :]), None)
        if argument.startswith("--hostfile="):
            return argument.partition("=")[2]
    return None


def _is_deepspeed(command: Sequence[str]) -> bool:
    return any(Path(part).name in DEEPSPEED for part in command[:4])
