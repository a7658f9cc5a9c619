"""Run a launcher, and end it if the job has failed but the launcher has not.

    python launch/supervise.py srun ... python launch/train.py ...

When a host is lost, every rank ends within half a minute, but srun waits for the host until SLURM gives it up (5
minutes by default) and mpirun for hours.  This passes standard error through and, once a rank has told the job's
failure, gives the launcher GRACE_SECONDS to end.  Signals to this process alone are passed on.  Exits as the launcher
does, but never 0 after a failure, and 75 if the ranks have stopped as asked, whatever the launcher makes of that.
Starts no launcher whose hostfile is not there or has a byte-order mark.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a plain checkout too

from lora_one_dist.cluster.hostfile import refuse_bad_given
from lora_one_dist.cluster.launchers import LaunchError

GRACE_SECONDS = 15.0
FAILURE = re.compile(rb"(^|: )rank \d+ on \S+ failed")  # as comm.fail writes it; launchers put the host's name in front
STOPPED = re.compile(rb"(^|: )rank \d+ on \S+ stopped as asked")  # as launch/train.py writes it
EXIT_FAILED = 1
EXIT_STOPPED = 75  # as launch/train.py exits


def main(command: list[str]) -> int:
    try:
        refuse_bad_given(command, Path.cwd())
    except LaunchError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the launcher itself
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: pass_on(received, launcher))
    failed, stopped = threading.Event(), threading.Event()
    reader = threading.Thread(target=pass_through, args=(launcher, failed, stopped), daemon=True)
    reader.start()
    while launcher.poll() is None and not failed.wait(1.0):
        pass
    try:
        code = launcher.wait(GRACE_SECONDS if failed.is_set() else None)
    except subprocess.TimeoutExpired:
        print(f"{command[0]} did not end in {GRACE_SECONDS:g} s after the failure: killed", file=sys.stderr)
        family = psutil.Process(launcher.pid)
        for process in (*family.children(recursive=True), family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        code = launcher.wait()
    reader.join(2.0)  # what is left in the pipe
    if code < 0:
        code = 128 - code
    if stopped.is_set() and not failed.is_set():
        return EXIT_STOPPED
    return code or (EXIT_FAILED if failed.is_set() else 0)


def pass_on(number: int, launcher: subprocess.Popen[bytes]) -> None:
    """SLURM sends SIGTERM to every process of the job by itself, and srun takes a second one for "at once"."""
    if number != signal.SIGTERM or "SLURM_JOB_ID" not in os.environ:
        launcher.send_signal(number)


def pass_through(launcher: subprocess.Popen[bytes], failed: threading.Event, stopped: threading.Event) -> None:
    assert launcher.stderr is not None, "a pipe"
    for line in launcher.stderr:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        if FAILURE.search(line):
            failed.set()
        if STOPPED.search(line):
            stopped.set()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: supervise.py LAUNCHER [argument ...]")
    sys.exit(main(sys.argv[1:]))
