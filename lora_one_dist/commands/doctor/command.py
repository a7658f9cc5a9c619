"""Why does the job not start, or crawl?  Looks at every host and names the odd one out.

    deepspeed --hostfile hostfile tools/doctor.py [--config run.yaml]       (or torchrun, srun python, mpirun python)
    python tools/doctor.py --hostfile hostfile [--config run.yaml]          (no launcher: over ssh, from this machine)

In: the hosts, and the model and output folder that a run would use.  Out: a table of what the ranks or hosts have, one
line per fault (value, who has it, what the others have, remedy), and exit code 1 if there is any.

Under a launcher each rank gathers its facts, joins the others as training does, and measures clock and bandwidth.  It
must run where packages are missing or broken: nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_one_dist.commands.doctor.facts import Row
from lora_one_dist.commands.doctor.ranks import among_ranks
from lora_one_dist.commands.doctor.ssh import over_ssh
from lora_one_dist.config.paths import name_argument

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # to say who failed before it knows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Look at every host of a job and name the odd one out.")
    parser.add_argument(
        "--hostfile", type=name_argument, help="without a launcher: ask these hosts over ssh (lines 'name slots=N')"
    )
    parser.add_argument("--config", type=name_argument, help="YAML file of the run, for its model.path and output_dir")
    parser.add_argument("--model", type=name_argument, help="model folder to look at, instead of the config's")
    parser.add_argument(
        "--output", type=name_argument, help="output folder to look at, instead of the config's or this folder"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for all ranks to arrive, at least 5")
    parser.add_argument("--megabytes", type=float, help="MiB to measure bandwidth with, 0: do not; 64, on CPUs 16")
    parser.add_argument("--ssh_port", type=int, help="port of sshd on the hosts")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher; LOCAL_RANK is what counts")
    arguments = parser.parse_args(argv)
    if arguments.timeout < 5:
        parser.error(f"--timeout {arguments.timeout:g}: must be at least 5. Give more seconds.")
    return arguments


def request_of(arguments: argparse.Namespace, root: Path) -> Row:
    """What to look at: the arguments of :func:`facts`."""
    config: Row = {}
    if arguments.config:
        import yaml

        with Path(arguments.config).open(encoding="utf-8") as file:
            config = yaml.safe_load(file)
        if not isinstance(config, dict) or not isinstance(config.get("model", {}), dict):
            raise ValueError(f"--config {arguments.config}: must be the YAML of a run. Give another file.")
    model = arguments.model or config.get("model", {}).get("path")
    output = arguments.output or config.get("output_dir", ".")
    model, output = (name_argument(path) if isinstance(path, str) else path for path in (model, output))
    return {"root": str(root), "folder": os.getcwd(), "model": model, "output": output}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if there are faults, or if a rank cannot join."""
    arguments = parse(argv)
    root = Path(__file__).resolve().parents[3]
    # Else c10d's stack traces bury what comm says of an address that cannot be reached. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        from lora_one_dist.cluster.launchers import resolve_launch

        request, launch = request_of(arguments, root), resolve_launch(os.environ)
        if arguments.hostfile and launch.source == "single process":
            return over_ssh(request, arguments.hostfile, arguments.ssh_port)
        from lora_one_dist.cluster import comm
    except Exception as error:  # half a launch environment, an unreadable file, or whatever a broken package raises
        rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
        print(f"rank {rank} on {socket.gethostname()} failed: {error}", file=sys.stderr)
        return 1
    try:
        return among_ranks(request, launch, arguments.timeout, arguments.megabytes)
    except Exception as error:
        comm.fail(error)
