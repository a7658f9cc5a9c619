"""How many samples does the one-step gradient need, and which rank?  Measured on your own model and data.

    deepspeed tools/coverage.py --config run.yaml --out runs/coverage         (or torchrun, srun python, mpirun python)
    python tools/coverage.py --config run.yaml --out runs/coverage            (one process)

Takes the gradient of --many samples and those of the first few of them, as training weighs tokens, and writes to --out
coverage.json, coverage.md and coverage.png: the share of the gradient's energy that each rank from 1 to 128 covers, and
for each of --samples how alike its gradient is to that of the many: signs, magnitudes, and the top lora.r spaces.
Nothing is trained.  Model, data and memory are the run's own (init.buffer, init.layer_groups, deepspeed.*); it takes as
much as an initialisation with init.halves.  Exit code 2: the arguments or the config are refused; 1: anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from lora_one_dist.commands import command_line
from lora_one_dist.commands.doctor.command import RANK_VARIABLES
from lora_one_dist.config import paths
from lora_one_dist.config.reading import ConfigError, load_config

EXIT_BAD_CONFIG = 2


class ArgumentsError(ValueError):
    """Arguments that contradict each other: value, rule and remedy."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--samples", default="1,2,4,8,16,32", help="counts to compare, rising (1,2,4,8,16,32)")
    parser.add_argument("--many", type=int, default=128, help="samples whose gradient is taken for the true one (128)")
    parser.add_argument("--out", type=paths.argument, required=True, help="folder to make; must not exist")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args(argv)


def counts_of(arguments: argparse.Namespace) -> list[int]:
    """``--samples`` as numbers.  Raises ArgumentsError, also for what ``--many`` and ``--out`` may not be."""
    try:
        counts = [int(part) for part in arguments.samples.split(",")]
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or any(low >= high for low, high in pairwise(counts)):
        raise ArgumentsError(f"--samples {arguments.samples}: must be whole numbers from 1 that rise. E.g. 1,2,4,8.")
    if arguments.many < max(2, counts[-1]):
        raise ArgumentsError(
            f"--many {arguments.many}: must be at least 2 and the last of --samples, {counts[-1]}. Raise it or leave "
            "counts out."
        )
    if arguments.out.exists():
        raise ArgumentsError(f"--out {arguments.out}: exists. Give a folder that does not.")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; a failure on the ranks ends the process instead."""
    arguments = parse(argv)
    is_first = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"
    try:
        counts = counts_of(arguments)
        config = load_config(
            arguments.config, arguments.overrides, command_line.tell if is_first else lambda note: None
        )
    except (ArgumentsError, ConfigError) as error:
        if is_first:
            print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as launch/train.py; read when torch is imported
    from lora_one_dist.cluster import comm  # imports torch: seconds that bad arguments need not wait for

    try:
        comm.init(config.comm)
        from lora_one_dist.commands.coverage.ranks import report  # slow: from here on a failure reaches all ranks

        report(config, counts, arguments.many, arguments.out)
        comm.shutdown()
    except Exception as error:
        comm.fail(error)
    return 0
