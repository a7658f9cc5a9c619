"""Parse the command line, then train.

    deepspeed launch/train.py --config launch/configs/demo.yaml [key.sub=value ...]
    torchrun --nproc_per_node 8 launch/train.py --config ...
    srun python launch/train.py --config ...
    python launch/train.py --config ...            (one process)

Exits 0 at the end of the run; 2 with every problem of a bad config, before anything is loaded; 75 if a signal asked it
to stop and everything is saved, so that the same command goes on; 1 on a failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    # SIGUSR1 asks to stop; until the rank can listen (comm.init), it waits instead of ending the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.config.reading import ConfigError, load_config

EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # to print a bad config once


def tell(note: str) -> None:
    print(note, file=sys.stderr)


def ignore(note: str) -> None:
    pass


def main() -> int:
    parser = argparse.ArgumentParser(description="LoRA-One on DeepSpeed ZeRO-3.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the YAML's")
    arguments = parser.parse_intermixed_args()
    is_first = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"
    try:
        config = load_config(arguments.config, arguments.overrides, tell if is_first else ignore)
    except ConfigError as error:
        if is_first:
            print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG
    if arguments.print_config:
        if is_first:
            print(config.to_yaml(), end="")
        return 0
    # Read when torch is imported. c10d's warnings of addresses without names bury the job's own messages; and pieces of
    # GPU memory that can grow are not lost to fragments.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from lora_one_dist.cluster import comm  # imports torch: seconds that a bad config need not wait for

    code = 0
    try:
        comm.init(config.comm)
        from lora_one_dist.run.stopping import Stopped  # slow and large: from here on a failure reaches all ranks
        from lora_one_dist.run.story import run

        try:
            run(config)
        except Stopped:
            code = EXIT_STOPPED
            if comm.is_local_first():  # for launch/supervise.py: launchers make another code of 75, or kill slow ranks
                print(f"rank {comm.rank()} on {socket.gethostname()} stopped as asked", file=sys.stderr)
        comm.shutdown()
    except Exception as error:
        comm.fail(error)
    # Everything is written and closed. The interpreter's own teardown of gloo's and Arrow's threads now and then aborts
    # a finished process ("terminate called without an active exception"), which launchers report as a failed job.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
