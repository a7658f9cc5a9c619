"""Stopped by SLURM in each of its ways, the job goes on by itself and ends as if it had never been stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.hosts import Hosts

pytestmark = pytest.mark.full

SECONDS = 120  # for any one thing to happen, on a busy machine
STEPS = 20
# Nothing is saved on the way but what a signal asks for.
RUN = (f"train.max_steps={STEPS}", "checkpoint.steps=0")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class Submitted:
    """A job of train.sbatch on the four hosts."""

    def __init__(self, hosts: Hosts, out: Path, *overrides: str, flags: tuple[str, ...] = ()):
        self.hosts, self.out, self.log = hosts, out, out.with_suffix(".log")
        train = [jobs.CONFIG, *jobs.SHORT, *RUN, f"output_dir={out}", *overrides]
        sbatch = ["sbatch", "--parsable", "--nodes=4", "--ntasks-per-node=1", f"--output={self.log}", *flags]
        self.number = self.slurm(*sbatch, "launch/slurm/train.sbatch", *train)

    def slurm(self, *command: str) -> str:
        done = self.hosts.run(1, *command)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def shows(self, field: str) -> str:
        """A field of what SLURM tells about the job."""
        return re.search(rf"\b{field}=(\S+)", self.slurm("scontrol", "show", "job", self.number))[1]

    def wait_for(self, what: str, happened) -> float:
        """Return the seconds until it has happened."""
        started = time.monotonic()
        while not happened():
            assert time.monotonic() - started < SECONDS, f"{what}: not in {SECONDS} s:\n{self.output()}"
            time.sleep(0.1)
        return time.monotonic() - started

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(f"{count} steps", lambda: len(losses(self.out)) >= count or self.shows("JobState") in ENDED)

    def wait_for_end(self) -> str:
        self.wait_for("the job's end", lambda: self.shows("JobState") in ENDED)
        return self.shows("JobState")


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm in full."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def outcome(out: Path):
    files = [out / name / "adapter_model.safetensors" for name in ("adapter_init", "adapter")]
    return losses(out), [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.fixture(scope="module")
def straight(hosts, tmp_path_factory):
    """The outcome of the same job when nothing stops it."""
    job = Submitted(hosts, tmp_path_factory.mktemp("straight") / "run")
    assert job.wait_for_end() == "COMPLETED", job.output()
    assert job.shows("Restarts") == "0"
    steps, hashes = outcome(job.out)
    assert [step for step, _, _ in steps] == list(range(1, STEPS + 1))
    return steps, hashes


def preempt(job: Submitted) -> None:
    """A job of a higher partition wants the hosts."""
    job.slurm("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


WAYS = {
    "preempted": (preempt, "SIGTERM"),
    "scancel --signal": (lambda job: job.slurm("scancel", "--signal=USR1", job.number), "SIGUSR1"),
    "scontrol requeue": (lambda job: job.slurm("scontrol", "requeue", job.number), "SIGTERM"),
}


def check_resumed(job: Submitted, name: str, straight) -> None:
    """Every stop was heard by all ranks, saved, and gone on from; and the end is that of the straight run."""
    assert job.wait_for_end() == "COMPLETED", job.output()
    text = job.output()
    stops = re.findall(r"^stopped as asked, (step (\d+)|with the initialisation so far) saved", text, re.MULTILINE)
    saved = [step or "0" for _, step in stops]
    resumed = re.findall(r"^going on from \S+/checkpoints/step-(\d+), which 4 ranks have written", text, re.MULTILINE)
    assert saved, text
    assert saved == resumed
    for rank in range(4):
        assert text.count(f"rank {rank} on node{rank + 1}: {name}, stops when it next can") == len(saved)
    assert job.shows("Restarts") == str(len(saved))
    assert " failed: " not in text
    assert outcome(job.out) == straight


@pytest.mark.parametrize("way", WAYS)
def test_stopped_job_goes_on_by_itself_to_the_same_bits(way, hosts, straight, tmp_path):
    stop, name = WAYS[way]
    job = Submitted(hosts, tmp_path / "run")
    job.wait_for_steps(3)
    stop(job)
    to_saved = job.wait_for("a checkpoint", lambda: "stopped as asked" in job.output())
    to_resumed = job.wait_for("going on", lambda: "going on from" in job.output())
    print(f"{way}: saved after {to_saved:.1f} s, going on {to_resumed:.1f} s later")
    check_resumed(job, name, straight)


def test_job_goes_on_after_its_time_limit(hosts, straight, tmp_path):
    """SLURM asks at some moment of the only minute, perhaps before the ranks listen.  A rank is held until it has."""
    job = Submitted(hosts, tmp_path / "run", flags=("--time=1", "--signal=USR1@10"))
    job.wait_for("a step or the signal", lambda: losses(job.out) or "SIGUSR1" in job.output())
    for pid in jobs.ranks_on(hosts, 4).values():
        os.kill(pid, signal.SIGSTOP)
        try:
            job.wait_for("the signal", lambda: "SIGUSR1" in job.output())
        finally:
            os.kill(pid, signal.SIGCONT)
    to_saved = job.wait_for("a checkpoint", lambda: "stopped as asked" in job.output())
    print(f"time limit: saved {to_saved:.1f} s after the signal or later")
    job.wait_for("the job's return", lambda: job.shows("Restarts") == "1")
    job.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    check_resumed(job, "SIGUSR1", straight)


def test_job_preempted_before_training_starts_again(hosts, straight, tmp_path):
    """Its ranks end at once, within the grace time: SLURM would take that for the job's own end."""
    job = Submitted(hosts, tmp_path / "run")
    job.wait_for("its ranks", lambda: all(jobs.ranks_on(hosts, i) for i in hosts.numbers))
    preempt(job)
    assert job.wait_for_end() == "COMPLETED", job.output()
    assert job.shows("Restarts") == "1"
    assert "going on from" not in job.output()
    assert outcome(job.out) == straight


def test_cancelled_job_saves_and_does_not_run_again(hosts, tmp_path):
    job = Submitted(hosts, tmp_path / "run")
    job.wait_for_steps(3)
    job.slurm("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED", job.output()
    job.wait_for("the hosts to be free", lambda: not any(jobs.ranks_on(hosts, i) for i in hosts.numbers))
    assert re.search(r"^stopped as asked, step \d+ saved", job.output(), re.MULTILINE)
    time.sleep(8)  # a requeued job waits for 6 s
    assert (job.shows("JobState"), job.shows("Restarts")) == ("CANCELLED", "0")
