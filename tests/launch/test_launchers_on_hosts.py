"""Every launcher of the README on four hosts: the same numbers as one host."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sys
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


SHELLS = {
    "salloc": "salloc --quiet --ntasks 2 srun --interactive --preserve-env --pty",  # as it starts its shell by default
    "srun": "srun --ntasks 2 --pty",
}
WHO = "from lora_one_dist.cluster.launchers import resolve_launch; import os; print(resolve_launch(os.environ))"


@pytest.mark.parametrize("started", SHELLS)
def test_a_shell_of_slurm_is_refused_and_its_srun_works(started, hosts, tmp_path):
    """What SLURM really sets there: at the prompt nobody has started the second rank, srun starts both."""
    (tmp_path / "who.py").write_text(f"import sys; sys.path.insert(0, {os.getcwd()!r}); {WHO}")
    who = f"{sys.executable} {tmp_path}/who.py"
    typed = f"{who}; srun --overlap --ntasks 2 {who}; mpirun --oversubscribe -n 2 {who}"
    shell = f"{SHELLS[started]} bash --norc -ic {shlex.quote(typed)}"
    said = hosts.run(1, "script", "--quiet", "--return", "--command", shell, "/dev/null", timeout=60).stdout
    refused, _, rest = said.partition("with --ntasks 1.")
    assert "in which nobody has started the other ranks. Start all of them by srun --ntasks 2 " in refused, said
    for rank in (0, 1):
        assert f"Launch(source='srun', rank={rank}, world_size=2, local_rank={rank}, master_addr='node1'" in rest, said
        assert f"Launch(source='mpirun (mpi4py)', rank={rank}, world_size=2, local_rank={rank}" in rest, said
