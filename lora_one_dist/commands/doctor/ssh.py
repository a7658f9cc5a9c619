"""Without a launcher: every host of a hostfile is asked for its facts over ssh."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_one_dist.commands.doctor import facts
from lora_one_dist.commands.doctor.facts import CONNECT_SECONDS, Row, resolve
from lora_one_dist.commands.doctor.findings import many, report

SSH_SECONDS = 20


def over_ssh(request: Row, hostfile: str, port: int | None) -> int:
    """Ask every host of the hostfile at once, judge and say.  Returns the exit code."""
    from lora_one_dist.cluster.hostfile import refuse_bad  # not at the top: the doctor runs where packages are missing

    refuse_bad(Path(hostfile))
    hosts = hosts_in(Path(hostfile).read_text(encoding="utf-8"))
    with ThreadPoolExecutor(32) as pool:
        rows = list(pool.map(lambda host: ask(host, request | {"names": hosts}, port), hosts))
    print(f"{many(len(hosts), 'host')}, asked over ssh from {socket.gethostname()}")
    faults = report(print, rows)
    print("\n" + (many(len(faults), "fault") if faults else f"all {many(len(hosts), 'host')} agree"))
    return int(bool(faults))


def hosts_in(hostfile: str) -> list[str]:
    """Names in a hostfile of DeepSpeed: lines ``name slots=N``, comments with #.  Raises ValueError."""
    lines = [line for line in map(str.strip, hostfile.splitlines()) if line and not line.startswith("#")]
    names = [line.split()[0] for line in lines]
    wrong = [line for line in lines if not re.match(r"\S+\s+slots=\d+", line) or names.count(line.split()[0]) > 1]
    if wrong or not names:
        line = repr(wrong[0]) if wrong else "nothing"
        raise ValueError(f"hostfile holds {line}: must be one line 'name slots=N' for each host. Correct it.")
    return names


def ask(host: str, request: Row, port: int | None) -> Row:
    """The facts of a host, from :mod:`facts` run there."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *(["-p", str(port)] if port else [])]
    forwarded = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PYTHON")]  # as deepspeed
    there = shlex.join(["env", *forwarded, sys.executable, "-", json.dumps(request)])
    source, asked = Path(facts.__file__).read_text(encoding="utf-8"), time.time()
    try:
        run = subprocess.run(
            ["ssh", *options, host, there], input=source, capture_output=True, text=True, timeout=SSH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"host": host, "error": f"{host} has not answered in {SSH_SECONDS} s. A hung disk? Try: ssh {host} df"}
    except OSError as error:
        return {"host": host, "error": f"{host} was not asked: {error}. Install an ssh client here."}
    if run.returncode == 255:
        return {"host": host, "error": why_no_ssh(host, port or 22, _last(run.stderr))}
    answers = [line for line in run.stdout.splitlines() if line.startswith('{"host"')]  # login scripts may print too
    if not answers:
        why = f"{host} cannot run {sys.executable}: {_last(run.stderr)}"
        return {"host": host, "error": f"{why}. Make the same Python environment there, at the same path."}
    row = json.loads(answers[-1])
    ahead = max(row["time"] - time.time(), min(row["time"] - asked, 0.0))  # 0 for any time between question and answer
    return row | {"host": host, "address": resolve([host])[host], "clock s": round(ahead, 2)}


def _last(output: str) -> str:
    return (output.strip().splitlines() or [""])[-1].strip().rstrip(".")


def why_no_ssh(host: str, port: int, said: str) -> str:
    """What is in the way: the name, the port, or the key."""
    try:
        address = socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        return f"{host} cannot be resolved here ({error}). Add it to /etc/hosts, or correct the hostfile."
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        return f"{host}: no sshd at {address} port {port} ({error}). Start it, open the port, or give --ssh_port."
    return f"{host}: ssh fails ({said}). Try: ssh -o BatchMode=yes {host} true; for a refused key: ssh-copy-id {host}."
