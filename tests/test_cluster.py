"""Every launcher of the README on four hosts: the same numbers as one host, and signals that reach every rank."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time

import psutil
import pytest

from tests import jobs

pytestmark = pytest.mark.full

LAYOUTS = [
    ("pdsh", 4, 1, "4 ranks on 4 hosts, cpu, launched by deepspeed"),
    ("pdsh", 2, 2, "4 ranks on 2 hosts, cpu, launched by deepspeed"),
    ("openmpi", 4, 1, "4 ranks on 4 hosts, cpu, launched by mpirun (mpi4py)"),
    ("mpirun", 4, 1, "4 ranks on 4 hosts, cpu, launched by mpirun (mpi4py)"),
    ("torchrun-static", 2, 2, "4 ranks on 2 hosts, cpu, launched by torchrun"),
    ("torchrun-c10d", 2, 2, "4 ranks on 2 hosts, cpu, launched by torchrun"),
    ("sbatch", 4, 1, "4 ranks on 4 hosts, cpu, launched by srun"),
    ("sbatch-torchrun", 2, 2, "4 ranks on 2 hosts, cpu, launched by torchrun"),
]


def outcome(out):
    """Losses and gradient norms in full, held-out loss, and the hashes of both adapters."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    files = [out / name / "adapter_model.safetensors" for name in ("adapter_init", "adapter")]
    return steps, held_out, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.fixture(scope="module")
def one_host(hosts, tmp_path_factory):
    """The outcome of 4 ranks on a single host."""
    out = tmp_path_factory.mktemp("one") / "run"
    job = jobs.start(hosts, "pdsh", 1, 4, out)
    assert job.wait(120) == [0], job.output()
    assert "4 ranks on 1 host, cpu, launched by deepspeed" in job.output()
    return outcome(out)


@pytest.mark.parametrize(("launcher", "count", "slots", "says"), LAYOUTS)
def test_same_bits_as_on_one_host(launcher, count, slots, says, hosts, one_host, tmp_path):
    """Equal to the last bit, not only as printed: gloo's reductions depend on the ranks alone, and those of the
    adapters' gradients add in one order as long as hosts have a power of two of ranks (module comm)."""
    out = tmp_path / "run"
    started = time.monotonic()
    job = jobs.start(hosts, launcher, count, slots, out)
    codes = job.wait(120)
    assert codes == [0] * len(codes), job.output()
    print(f"{launcher} {count}x{slots}: {time.monotonic() - started:.0f} s")
    assert says in job.output()
    assert outcome(out) == one_host
    assert not any(jobs.ranks_on(hosts, i) for i in hosts.numbers), "no process is left behind"


def test_signal_before_the_time_limit_reaches_every_rank_and_is_logged(hosts, tmp_path):
    """SLURM sends SIGUSR1 to the job's steps; here by scancel, as the time limit would."""
    out = tmp_path / "run"
    job = jobs.start(hosts, "sbatch", 4, 1, out, "train.max_steps=3000")
    try:
        jobs.wait_for_steps(job, out / "metrics.jsonl", 1)
        name = hosts.run(1, "squeue", "-h", "-o", "%i").stdout.strip()
        assert hosts.run(1, "scancel", "--signal=USR1", name).returncode == 0
        logged = [f"rank {rank} on node{rank + 1}: SIGUSR1" for rank in range(4)]
        deadline = time.monotonic() + 20
        while not all(line in job.output() for line in logged):
            assert time.monotonic() < deadline, job.output()
            time.sleep(0.1)
        steps = (out / "metrics.jsonl").read_text().count('"loss"')
        jobs.wait_for_steps(job, out / "metrics.jsonl", steps + 2)
        assert hosts.run(1, "scancel", name).returncode == 0, "the job goes on until it is ended"
        assert job.wait(60) != [None]
    finally:
        job.end()


def test_job_ends_with_its_launcher(hosts, tmp_path):
    """Ranks whose launcher was killed do not live on."""
    out = tmp_path / "run"
    job = jobs.start(hosts, "torchrun-static", 2, 2, out, "train.max_steps=3000")
    try:
        jobs.wait_for_steps(job, out / "metrics.jsonl", 1)
        pids = jobs.ranks_on(hosts, 2)
        os.kill(psutil.Process(pids[2]).ppid(), signal.SIGKILL)
        codes = job.wait(60)
        assert None not in codes
        assert 0 not in codes, job.output()
        assert "its launcher (process" in job.output()
        assert not any(jobs.ranks_on(hosts, i) for i in hosts.numbers)
    finally:
        job.end()
