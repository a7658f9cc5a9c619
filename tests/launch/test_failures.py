"""A rank, a host or a link lost in mid-run: the job ends within a minute, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import jobs

pytestmark = pytest.mark.full

SECONDS = 60
LAUNCHERS = [("pdsh", 2, 2), ("sbatch", 4, 1), ("mpirun", 4, 1), ("torchrun-c10d", 2, 2)]
WITHOUT_A_WORD = "its process ended without a word"
LOST_AFTER = 6  # seconds: of 20 by default the tests would wait for most
UNREACHABLE = rf"it cannot be reached for {LOST_AFTER} s \(host down, or network cut"


def first_error(job: jobs.Job) -> str:
    """The first line of ours that tells a failure, without a launcher's prefix."""
    return next(line for line in job.output().splitlines() if " failed: " in line).split("node1: ")[-1]


@pytest.mark.parametrize("fault", ["rank", "host", "link"])
@pytest.mark.parametrize(("launcher", "count", "slots"), LAUNCHERS)
def test_job_ends_and_says_whose_fault_it_was(launcher, count, slots, fault, fresh_hosts, tmp_path):
    hosts, out = fresh_hosts, tmp_path / "run"
    if launcher == "sbatch":
        hosts.start_slurm()
    job = jobs.start(
        hosts, launcher, count, slots, out, "train.max_steps=3000", f"comm.lost_after_seconds={LOST_AFTER}"
    )
    try:
        jobs.wait_for_steps(job, out / "metrics.jsonl", 2)
        victim = count  # the last host
        ranks = jobs.ranks_on(hosts, victim)
        assert len(ranks) == slots
        started = time.monotonic()
        if fault == "rank":
            os.kill(ranks[max(ranks)], signal.SIGKILL)
        elif fault == "host":
            hosts.kill(victim)
        else:
            hosts.link(victim, "down")
        codes = job.wait(SECONDS)
        seconds = time.monotonic() - started
        print(f"{launcher} {fault}: {seconds:.0f} s, exit {codes}, {first_error(job)}")
        assert None not in codes, f"still running after {SECONDS} s:\n{job.output()}"
        assert 0 not in codes
        lost = [max(ranks)] if fault == "rank" else sorted(ranks)
        cause = UNREACHABLE if fault == "link" else WITHOUT_A_WORD
        assert re.match(rf"rank ({'|'.join(map(str, lost))}) on node{victim} failed: {cause}", first_error(job))
        while any(jobs.ranks_on(hosts, i) for i in hosts.numbers):
            assert time.monotonic() - started < SECONDS, "ranks are left behind"
            time.sleep(0.1)
    finally:
        job.end()


def test_rank_that_raises_in_mid_run_is_named_with_its_traceback(fresh_hosts, tmp_path):
    """A full file system on rank 0's host: what a rank meets between two collectives, told once and first."""
    hosts, out = fresh_hosts, tmp_path / "disk" / "run"
    out.parent.mkdir()
    job = jobs.start(hosts, "mpirun", 4, 1, out, "train.max_steps=3000", "checkpoint.on_failure=stop")
    try:
        jobs.wait_for_steps(job, out / "metrics.jsonl", 2)
        started = time.monotonic()
        assert hosts.run(1, "prlimit", "--pid", _inside(jobs.ranks_on(hosts, 1)[0]), "--fsize=0").returncode == 0
        codes = job.wait(SECONDS)
        print(f"raises: {time.monotonic() - started:.0f} s, exit {codes}, {first_error(job)}")
        assert codes not in ([None], [0])
        assert re.match(r"rank 0 on node1 failed: OSError: \[Errno 27\] File too large", first_error(job))
        assert job.output().count(" failed: ") == 1, "the others end without repeating it"
        assert job.output().count("Traceback") == 1
    finally:
        job.end()


def _inside(pid: int) -> int:
    """A process id as its own host numbers it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)[1])
