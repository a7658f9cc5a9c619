"""The wrapper around launchers: it changes nothing, until a rank has told a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

GRACE_SECONDS = 0.4
SECONDS = 20  # for what takes two, on a busy machine
FAILURE = "rank 3 on node2 failed: disk full"
RUN = f"""
import sys
sys.path.insert(0, "launch")
import supervise
supervise.GRACE_SECONDS = {GRACE_SECONDS}
sys.exit(supervise.main(sys.argv[1:]))
"""
LAUNCHER = """
import os, signal, subprocess, sys, time
def say(text):
    print(text, file=sys.stderr, flush=True)
"""


def start(launcher: str, **env: str) -> subprocess.Popen[bytes]:
    """Supervise a launcher written in Python."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    command = [sys.executable, "-c", RUN, sys.executable, "-c", LAUNCHER + launcher]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env={**inherited, **env}, **pipes)


def run(launcher: str) -> tuple[int, bytes, bytes]:
    process = start(launcher)
    stdout, stderr = process.communicate(timeout=SECONDS)
    return process.returncode, stdout, stderr


def test_output_and_exit_code_are_the_launchers():
    speech = "print('out', flush=True); sys.stderr.buffer.write(b'one\\xff\\ntwo without an end'); sys.stderr.flush()"
    assert run(f"{speech}; sys.exit(7)") == (7, b"out\n", b"one\xff\ntwo without an end")


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_no_launcher_is_started_with_a_bad_hostfile(launcher, tmp_path):
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfnode1 slots=2\n")
    for name, rule in [("gone", "no such file; deepspeed would go on"), ("hosts", "begins with a byte-order mark")]:
        command = [sys.executable, "-c", RUN, launcher, "--hostfile", tmp_path / name, "launch/train.py"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith(f"--hostfile {tmp_path / name}: {rule}")


def test_text_that_tells_no_failure_of_a_rank_changes_nothing():
    others = ["rank 3 failed", "rank 3 on node2 has failed", "a rank 3 on node2 failed", "rank x on node2 failed: y"]
    code, _, stderr = run(f"say({chr(10).join(others)!r}); time.sleep({GRACE_SECONDS + 0.4})")
    assert (code, stderr.decode().splitlines()) == (0, others), "and it may run for as long as it likes"


@pytest.mark.parametrize("prefix", ["", "node1: ", "3: ", "[1,3]<stderr>: "])
@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(0)", 1), ("sys.exit(4)", 4), ("os.kill(os.getpid(), signal.SIGTERM)", 143)]
)
def test_launcher_that_ends_after_a_failure_never_ends_well(prefix, ending, code):
    line = prefix + FAILURE
    assert run(f"say({line!r}); {ending}") == (code, b"", line.encode() + b"\n")


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(0)", 75), ("sys.exit(1)", 75), (f"say({FAILURE!r}); sys.exit(4)", 4)]
)
def test_stop_is_told_by_its_code_whatever_the_launcher_makes_of_it_but_never_hides_a_failure(ending, code):
    assert run(f"say('node1: rank 0 on node1 stopped as asked'); {ending}")[0] == code


def test_launcher_that_hangs_after_a_failure_is_killed_with_its_children():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    launcher = f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}]); say(child.pid); say({FAILURE!r}); {deaf}"
    started = time.monotonic()
    code, _, stderr = run(launcher)
    assert GRACE_SECONDS <= time.monotonic() - started <= SECONDS
    child, *lines = stderr.decode().splitlines()
    assert lines == [FAILURE, f"{sys.executable} did not end in {GRACE_SECONDS} s after the failure: killed"]
    assert code == 128 + signal.SIGKILL
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("env", "passed"), [({}, ["SIGUSR1", "SIGTERM"]), ({"SLURM_JOB_ID": "7"}, ["SIGUSR1"])])
def test_signals_are_passed_on_but_for_what_slurm_sends_to_all(env, passed):
    launcher = """
for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: say(signal.Signals(number).name))
say("ready")
sys.stdin.read()
"""
    process = start(launcher, **env)
    try:
        assert process.stderr.readline() == b"ready\n"
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.2)
        process.stdin.close()
        assert process.stderr.read().decode().split() == passed, "a terminal sends SIGINT to the launcher itself"
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
