"""What the command lines of the conversion tools share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from lora_one_dist.convert import files
from lora_one_dist.convert.files import ConversionError
from lora_one_dist.weights import WeightsError

P = TypeVar("P", bound="Plan")


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser that shows a tool's docstring as it is."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_out(parser: argparse.ArgumentParser) -> None:
    """``--out`` and ``--dry_run``."""
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and check the disk, write nothing")


def positive(text: str) -> int:
    """An argument that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


class Plan(Protocol):
    """What a conversion will write."""

    @property
    def tensors(self) -> Mapping[str, files.LazyTensor]: ...
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


def run(main: Callable[[], int]) -> int:
    """Exit code of a tool: what it returns, or 1 after an error that its user can mend."""
    try:
        return main()
    except (ConversionError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
