"""What the command lines of the conversion tools share."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from lora_one_dist.config import paths
from lora_one_dist.convert import files
from lora_one_dist.disk.lazy import ConversionError, LazyTensor
from lora_one_dist.disk.weights import WeightsError

P = TypeVar("P", bound="Plan")
A = ParamSpec("A")


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser that shows a tool's docstring as it is."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_out(parser: argparse.ArgumentParser) -> None:
    """``--out`` and ``--dry_run``."""
    parser.add_argument("--out", type=paths.argument, required=True, help="folder to make; must not exist")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and check the disk, write nothing")


def tell(note: str) -> None:
    """What :func:`~lora_one_dist.config.reading.load_config` has to say, where it spoils no output."""
    print(note, file=sys.stderr)


def positive(text: str) -> int:
    """An argument that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


class Plan(Protocol):
    """What a conversion will write."""

    @property
    def tensors(self) -> Mapping[str, LazyTensor]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def num_bytes(self) -> int: ...


def carry_out(planned: P, write: Callable[[P, Path], None], out: Path, dry_run: bool) -> int:
    """Print a plan and, unless it is a dry run, have it written.  Returns the exit code."""
    for note in planned.notes:
        print(note)
    print(f"{len(planned.tensors)} tensors, {files.readable(planned.num_bytes)} -> {out}")
    if dry_run:
        files.refuse_full_disk(out, planned.num_bytes)
        return 0
    write(planned, out)
    print(f"written: {out}")
    return 0


def tells_errors(main: Callable[A, int]) -> Callable[A, int]:
    """A command's ``main`` that prints an error which its user can mend, and returns 1 then."""

    @functools.wraps(main)
    def told(*args: A.args, **kwargs: A.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (ConversionError, WeightsError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return told
