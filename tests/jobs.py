"""The same job under each launcher, on the four hosts of tests/hosts.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.hosts import Hosts

CONFIG = "launch/configs/demo.yaml"
SHORT = (
    "train.max_steps=3",
    "train.log_steps=1",
    "train.eval_steps=0",
    "train.exact_match_samples=0",
    "train.exact_match_pattern=null",
    "train.exact_match_max_new_tokens=64",
    "optim.warmup_steps=0",
    "data.max_eval_samples=16",
    "data.max_train_samples=200",
    "train.micro_batch_size=4",  # of 32 samples a step: every one of 4 to 6 ranks has its own part of the gradient
)

# Ends when the job runs no more, with its exit code; sbatch --wait looks twice a minute only.
WAIT_FOR_SLURM = """
job=$(sbatch --parsable "$@") || exit
while [ -n "$(squeue -h -j "$job" -t PENDING,RUNNING)" ]; do sleep 0.2; done
code=$(scontrol show job "$job" | grep -o ' ExitCode=[0-9]*')
exit "${code#*=}"
"""


class Job:
    """One training job: one process, or one on each host under torchrun."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]], logs: Sequence[Path]):
        self.processes = processes
        self.logs = logs

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes; None for what has not ended in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.1)
        return [process.poll() for process in self.processes]

    def output(self) -> str:
        """What was printed so far, standard error among it."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def start(hosts: Hosts, launcher: str, hosts_used: int, slots: int, out: Path, *overrides: str) -> Job:
    """Start launch/train.py on ``hosts_used`` hosts with ``slots`` ranks each.

    Args:
        launcher: pdsh, openmpi, mpirun, torchrun-static, torchrun-c10d, sbatch or sbatch-torchrun.
    """
    hostfile = hosts.hostfile(hosts_used, slots)
    train = [CONFIG, *SHORT, f"output_dir={out}", *overrides]
    log = out.with_suffix(".log")
    deepspeed = ["deepspeed", "--hostfile", hostfile]
    script = ["launch/train.py", "--config", *train]
    sbatch = ["sbatch", "--nodes", hosts_used, "--ntasks-per-node", slots, f"--output={log}"]
    commands = {
        "pdsh": [*deepspeed, *script],
        "openmpi": [*deepspeed, "--launcher", "openmpi", *script],
        "mpirun": ["launch/mpi.sh", hostfile, *train],
        "sbatch": ["sh", "-c", WAIT_FOR_SLURM, *sbatch, "launch/slurm/train.sbatch", *train],
        "sbatch-torchrun": ["sh", "-c", WAIT_FOR_SLURM, *sbatch, "launch/slurm/torchrun.sbatch", *train],
    }
    if launcher in commands:
        own_log = log.with_suffix(".sbatch") if launcher.startswith("sbatch") else log
        with own_log.open("w") as file:
            return Job([hosts.popen(1, *commands[launcher], stdout=file, stderr=subprocess.STDOUT)], [log])
    processes, logs = [], []
    for i in range(1, hosts_used + 1):
        env = {"NNODES": str(hosts_used), "HEAD": "node1", "PROCS_PER_NODE": str(slots)}
        if launcher == "torchrun-static":
            env["NODE_RANK"] = str(i - 1)
        logs.append(out.with_suffix(f".{i}.log"))
        with logs[-1].open("w") as file:
            command = ["launch/torchrun.sh", *train]
            processes.append(hosts.popen(i, *command, env=env, stdout=file, stderr=subprocess.STDOUT))
    return Job(processes, logs)


def start_script(hosts: Hosts, hosts_used: int, slots: int, log: Path, *command: object) -> Job:
    """Start any script and its arguments by deepspeed over pdsh."""
    launch = ["deepspeed", "--hostfile", hosts.hostfile(hosts_used, slots), *command]
    with log.open("w") as file:
        return Job([hosts.popen(1, *launch, stdout=file, stderr=subprocess.STDOUT)], [log])


def wait_for_steps(job: Job, metrics: Path, steps: int, seconds: float = 120) -> None:
    """Return when the job has trained so many steps, by its metrics.jsonl."""
    deadline = time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count('"loss"') < steps:
        ended = [process.poll() for process in job.processes]
        assert all(code is None for code in ended), f"the job ended by itself, {ended}:\n{job.output()}"
        assert time.monotonic() < deadline, f"no step {steps} in {seconds} s:\n{job.output()}"
        time.sleep(0.02)


def ranks_on(hosts: Hosts, i: int) -> dict[int, int]:
    """Process ids of host i's ranks, by rank."""
    found = {}
    for pid in hosts.pids(i):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
        values = dict(item.decode().split("=", 1) for item in environment if b"=" in item)
        rank = next((values[name] for name in names if name in values), None)
        if rank is not None and any(part.endswith(b"launch/train.py") for part in command[1:3]):
            found[int(rank)] = pid
    return found
