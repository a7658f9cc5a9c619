"""Why does the job not start, or crawl?  Looks at every host and names the odd one out.

    deepspeed --hostfile hostfile tools/doctor.py [--config run.yaml]       (or torchrun, srun python, mpirun python)
    python tools/doctor.py --hostfile hostfile [--config run.yaml]          (no launcher: over ssh, from this machine)

In: the hosts, and the model and output folder that a run would use.  Out: a table of what the ranks or hosts have, one
line per fault (value, who has it, what the others have, remedy), and exit code 1 if there is any.

Under a launcher each rank gathers its facts, joins the others as training does, and measures clock and bandwidth.  Over
ssh this file is sent to each host and runs there as ``--facts`` on the standard library alone: hence no other import at
its top.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
"""Facts of one rank, or of one host over ssh, by name; or the "error" that kept them away."""

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
VARIABLES = re.compile(r"(NCCL|GLOO|TORCH|HF)_.*|DS_ACCELERATOR|OMP_NUM_THREADS")
BROKEN = ("missing", "unreadable", "unwritable")  # how a fact begins that is a fault on any number of hosts
UNKNOWN = "nothing"  # what a name that cannot be resolved resolves to
SAME_PACKAGES = "Install the same everywhere: pip install -c constraints.txt -e ."
SAME_NAME = "Correct /etc/hosts or the name server there."
SAME_VARIABLE = "Set it alike: .deepspeed_env under deepspeed, export before srun and torchrun, -x after mpirun."
AGREE = {  # facts that must be alike, and the remedy
    "python": "Start the same Python everywhere.",
    **dict.fromkeys((*PACKAGES, "CUDA"), SAME_PACKAGES),
    "code": "All hosts must run the same files: share the checkout, or copy it again.",
    "folder": "The job starts there on every host: share the folder, or make it under the same path.",
    "model": "All hosts must read the same model: share its folder, or copy it again.",
    "output": "Give an output folder that can be written.",
    "GPUs": "Compare nvidia-smi; give a job hosts that are alike, with one driver.",
}
LEAST = {  # facts with a lower bound
    "disk GiB": (1.0, "Free the disk of the output folder."),
    "shm GiB": (0.25, "NCCL and data loaders use /dev/shm; docker's 64 MiB are too few: --shm-size=8g."),
    "open files": (1024, "Raise it: ulimit -n 65536."),
}
HALF = {  # facts that must be at least half of the other hosts' median
    "memory GiB": "Does another job run there?",
    "inside GB/s": "Look at the links of its GPUs (nvidia-smi topo -m), and for another job.",
    "link GB/s": "Look at its network card, cable and switch port (ethtool, ibstat), and at the interface used.",
}
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # to say who failed before it knows
HIDDEN = ("rank", "names", "variables", "time")
CELL = 24  # characters
CLOCK_SECONDS, CLOCK_ROUNDS = 1.0, 5
REPEATS = 7
SSH_SECONDS, CONNECT_SECONDS = 20, 5


# Facts of this host: standard library only ----------------------------------------------------------------------------


def facts(root: str, folder: str, model: str | None, output: str, names: Sequence[str] = ()) -> Row:
    """What this host has, as JSON values.  ``root``: the checkout; ``folder``: where the job starts."""
    out = Path(output).absolute()
    out = next(place for place in (out, *out.parents) if place.exists())
    return {
        "host": socket.gethostname(),
        "memory GiB": free_memory(),
        "disk GiB": shutil.disk_usage(out).free / 2**30,
        "shm GiB": shutil.disk_usage("/dev/shm").free / 2**30,
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "code": code(Path(root)),
        "path": root,
        "folder": folder if Path(folder).is_dir() else f"missing: {folder}",
        "model": fingerprint(model) if model else "-",
        "output": "writable" if os.access(out, os.W_OK) else f"unwritable: {out}",
        "GPUs": gpus(),
        "variables": variables(os.environ),
        "names": resolve(names),
        "time": time.time(),
    }


def free_memory() -> int | None:
    """GiB of host memory that a new process could take, rounded."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return round(int(found[1]) / 2**20) if found else None


def version(package: str) -> str:
    """Its installed version, from its metadata: a package that cannot be imported has one too."""
    try:
        return importlib.metadata.version(package) or "missing"
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def code(root: Path) -> str:
    """Short hash of the files that a job runs."""
    files = sorted([*root.glob("lora_one_dist/*.py"), *root.glob("launch/*.py"), root / "tools/doctor.py"])
    try:
        return _hash(b"".join(str(file.relative_to(root)).encode() + file.read_bytes() for file in files))
    except OSError as error:
        return f"missing: {error}"


def fingerprint(model: str) -> str:
    """Short hash of what copies of a model share, or "unreadable: " with the exact error.

    Of config.json, the index of the safetensors (without one: the header of model.safetensors), and the files' sizes.
    """
    folder = Path(model)
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if not folder.exists() and not folder.is_absolute() and model.count("/") < 2:
            return "no folder"  # a name on the hub?
        content = (folder / "config.json").read_bytes()
        if index.exists():
            content += index.read_bytes()
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            with (folder / name).open("rb") as file:
                start = file.read(8)
                if len(start) < 8:
                    raise ValueError(f"{folder / name} is cut short")
                if not index.exists():
                    content += file.read(int.from_bytes(start, "little"))
                content += f"{name} {file.seek(0, os.SEEK_END)}".encode()
    except (OSError, ValueError, KeyError) as error:
        return f"unreadable: {error}"
    return _hash(content)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def gpus() -> str:
    """The driver's GPUs, counted: '8 x NVIDIA H200, 143771 MiB, 570.86.15'; '-' without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=CONNECT_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return "-"
    return _counted(listed.splitlines())


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{number} x {kind}" for kind, number in Counter(kinds).items())


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """Variables that change how a job runs.  Of a token only a hash."""
    found = {name: value for name, value in env.items() if VARIABLES.fullmatch(name)}
    return {name: f"(hash {_hash(value.encode())})" if "TOKEN" in name else value for name, value in found.items()}


def resolve(names: Sequence[str]) -> dict[str, str]:
    """The IPv4 address that each name means here."""

    def address(name: str) -> str:
        try:
            return socket.gethostbyname(name)
        except (OSError, UnicodeError):
            return UNKNOWN

    with ThreadPoolExecutor(32) as pool:  # an unknown name may wait seconds for its server
        return dict(zip(names, pool.map(address, names), strict=True))


# Judging: pure --------------------------------------------------------------------------------------------------------


def odd_ones_out(rows: Sequence[Row]) -> list[str]:
    """One line per fault.  Facts that rows lack are not judged."""
    seen = [row for row in rows if "error" not in row]
    errors = [str(row["error"]) for row in rows if "error" in row]
    return errors + differing(seen) + too_little(seen) + slow(seen) + wrong_clocks(seen)


def differing(rows: Sequence[Row]) -> list[str]:
    """Faults of what must be alike: facts, variables, and what each name means."""
    set_somewhere = dict.fromkeys(name for row in rows for name in row.get("variables", ()))
    remedies = AGREE | dict.fromkeys(set_somewhere, SAME_VARIABLE)
    views = [row | {name: row.get("variables", {}).get(name, "unset") for name in set_somewhere} for row in rows]
    for name in dict.fromkeys(name for row in rows for name in row.get("names", ())):
        remedies[f"{name} resolves to"] = SAME_NAME
        known = any(row["names"][name] != UNKNOWN for row in rows if row["host"] != name)
        for row, view in zip(rows, views, strict=True):
            if row["host"] != name or (known and not _is_private(row)):
                view[f"{name} resolves to"] = row["names"][name]
    return [fault for fact, remedy in remedies.items() for fault in _odd_values(views, fact, remedy)]


def _is_private(row: Row) -> bool:
    """Does its own name say nothing to others?  Debian has it loop back, containers need not know it."""
    own = row["names"].get(row["host"], UNKNOWN)
    return own == UNKNOWN or own.startswith("127.")


def _odd_values(rows: Sequence[Row], fact: str, remedy: str) -> list[str]:
    having = by_value(rows, fact)
    broken = [value for value in having if str(value).startswith(BROKEN)]
    faults = [f"{fact} {value} on {who(having.pop(value))}. {remedy}" for value in broken]
    usual = majority(having)
    if usual is None and len(having) > 1:
        each = ", ".join(f"{value} on {who(of)}" for value, of in having.items())
        return [*faults, f"{fact} {each}: no majority. {remedy}"]
    others = "the others" if len(having) == 2 else "most"
    return faults + [
        f"{fact} {value} on {who(of)}, {usual} on {others}. {remedy}" for value, of in having.items() if value != usual
    ]


def by_value(rows: Sequence[Row], fact: str) -> dict[Any, list[Row]]:
    """The rows that have each value of a fact."""
    having: dict[Any, list[Row]] = {}
    for row in rows:
        if fact in row:
            having.setdefault(row[fact], []).append(row)
    return having


def majority(having: Mapping[Any, Sequence[Row]]) -> Any:
    """The value of more than half of the hosts, or None.  Each host has one vote, which its ranks share."""
    ranks_of = Counter(row["host"] for rows in having.values() for row in rows)
    votes = {value: sum(Fraction(1, ranks_of[row["host"]]) for row in rows) for value, rows in having.items()}
    return next((value for value, vote in votes.items() if 2 * vote > len(ranks_of)), None)


def who(rows: Sequence[Row]) -> str:
    """'node3 (ranks 4-5)', or the host alone over ssh."""
    hosts = ", ".join(dict.fromkeys(row["host"] for row in rows))
    ranks = [row["rank"] for row in rows if "rank" in row]
    return f"{hosts} (rank{'s' * (len(ranks) > 1)} {ranges(ranks)})" if ranks else hosts


def ranges(numbers: Sequence[int]) -> str:
    """'0-3,8' for 0, 1, 2, 3, 8."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def per_host(rows: Sequence[Row], fact: str) -> dict[str, float]:
    """The least number of each host that has any."""
    measured = by_value([row for row in rows if row.get(fact) is not None], "host")
    return {host: min(row[fact] for row in of) for host, of in measured.items()}


def too_little(rows: Sequence[Row]) -> list[str]:
    """Faults of what is short, whatever the others have."""
    return [
        f"{fact} {value:.3g} on {host}: must be at least {least:g}. {remedy}"
        for fact, (least, remedy) in LEAST.items()
        for host, value in per_host(rows, fact).items()
        if value < least
    ]


def slow(rows: Sequence[Row]) -> list[str]:
    """Faults of hosts below half of the others' median.  Of fewer than three hosts none can be told apart."""
    faults = []
    for fact, remedy in HALF.items():
        values = per_host(rows, fact)
        for host, value in values.items() if len(values) > 2 else ():
            usual = median(other for name, other in values.items() if name != host)
            if value < usual / 2:
                faults.append(f"{fact} {value:.3g} on {host}: below half of {usual:.3g}, the others' median. {remedy}")
    return faults


def wrong_clocks(rows: Sequence[Row]) -> list[str]:
    """Faults of clocks more than a second apart: those away from the middle."""
    offsets = per_host(rows, "clock s")
    if not offsets or max(offsets.values()) - min(offsets.values()) <= CLOCK_SECONDS:
        return []
    return [
        f"clock of {host} {offset - median(offsets.values()):+.1f} s from the middle one. Start chrony or ntpd there."
        for host, offset in offsets.items()
        if abs(offset - median(offsets.values())) > CLOCK_SECONDS / 2
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What is no fault but good to know."""
    hosts = {row["host"]: row for row in rows}
    said = [
        f"{host} resolves its own name to {row['names'][host]}. Training does not mind: it sets the interface itself."
        for host, row in hosts.items()
        if host in row.get("names", ()) and _is_private(row)
    ]
    if {row.get("model") for row in rows} == {"no folder"}:
        said.append("the model is taken for a name on the hub: its files were not looked at.")
    if len(hosts) == 2 and "link GB/s" in rows[0]:
        said.append("of two hosts neither can be called slow: compare the figures yourself.")
    return said


def table(rows: Sequence[Row]) -> list[str]:
    """One line for the ranks of a host that are alike; what all rows have alike stands below, once."""
    shown = [fact for fact in dict.fromkeys(fact for row in rows for fact in row) if fact not in HIDDEN]
    cells = {fact: [_cell(row.get(fact)) for row in rows] for fact in shown}
    same = [fact for fact in shown if fact != "host" and len(set(cells[fact])) == 1]
    columns = [fact for fact in shown if fact not in same]
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        ranks_of.setdefault(tuple(cells[fact][i][:CELL] for fact in columns), []).append(row.get("rank", i))
    lines = [["rank", *columns], *([ranges(ranks), *line] for line, ranks in ranks_of.items())]
    lines = lines if "rank" in rows[0] else [line[1:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    alike = ["\xa0".join((fact, cells[fact][0])) for fact in same if cells[fact][0] != "-"]  # kept on one line
    wrapped = textwrap.wrap("everywhere: " + ", ".join(alike), 120, subsequent_indent="  ") if alike else []
    return text + [line.replace("\xa0", " ") for line in wrapped]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def report(say: Callable[[str], None], rows: Sequence[Row]) -> list[str]:
    """Say table, notes and faults.  Returns the faults."""
    seen, faults = [row for row in rows if "error" not in row], odd_ones_out(rows)
    for line in table(seen) if seen else ():
        say(line)
    for line in [f"note: {note}" for note in notes(seen)] + [f"fault: {fault}" for fault in faults]:
        say(line)
    return faults


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# Under a launcher -----------------------------------------------------------------------------------------------------


def among_ranks(request: Row, launch: Any, seconds: float, megabytes: float | None) -> int:
    """Gather, judge and say the facts of all ranks, then their bandwidths.  Returns the exit code.  Collective."""
    from lora_one_dist import comm
    from lora_one_dist.config import CommConfig
    from lora_one_dist.launchers import address_towards, interface_of

    own = {"rank": launch.rank} | facts(**request) | {"CUDA": seen_by_torch()}  # who hangs here never arrives
    comm.init(CommConfig(rendezvous_seconds=seconds, init_timeout_seconds=max(30.0, seconds)), launch)
    say: Callable[[str], None] = print if comm.rank() == 0 else lambda _: None
    address = address_towards(launch.master_addr)
    hosts = list(dict.fromkeys(comm.all_gather_object(own["host"])))
    own |= {"address": address, "interface": interface_of(address), "clock s": clock_offset(), "names": resolve(hosts)}
    rows = comm.all_gather_object(own)
    job, kind = f"{_many(len(rows), 'rank')} on {_many(len(hosts), 'host')}", comm.device().type
    say(f"{job}, {kind}, launched by {launch.source}")
    faults = report(say, rows)
    size = megabytes if megabytes is not None else 64.0 if kind == "cuda" else 16.0
    if len(rows) > 1 and size > 0:
        say(f"\nbandwidth, median of {REPEATS} with {size:g} MiB (if it stops here, NCCL_DEBUG=INFO says more)")
        places = [[row["rank"] for row in of] for of in by_value(rows, "host").values()]
        speeds = comm.all_gather_object(own_bandwidth(places, size))
        faults += report(say, [speeds[ranks[0]] for ranks in places])
    say("\n" + (_many(len(faults), "fault") if faults else f"all {job} agree"))
    comm.shutdown()  # nobody leaves before rank 0 has said all
    return int(bool(faults))


def seen_by_torch() -> str:
    """What torch was built for and the GPUs that it sees; '-' if it sees none."""
    import torch

    if not torch.cuda.is_available():
        return "-"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = _counted([f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices])
    return f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, {names}"


def clock_offset() -> float:
    """Seconds this clock is ahead of rank 0's, in the round where all looked most nearly at once.  Collective."""
    from lora_one_dist import comm

    looks = []
    for _ in range(CLOCK_ROUNDS):
        comm.barrier()
        looks.append(comm.all_gather_floats(time.time()))
    closest = min(looks, key=lambda times: max(times) - min(times))
    return round(closest[comm.rank()] - closest[0], 2)


def own_bandwidth(hosts: Sequence[Sequence[int]], megabytes: float) -> Row:
    """GB/s of all-reduces inside this host and between hosts, and with the neighbours on a ring of hosts.  Collective.

    ``hosts``: ranks of each.  An all-reduce of S bytes over n ranks in t seconds counts as 2 (n - 1) / n S / t: what
    crosses each rank's link.
    """
    import torch

    from lora_one_dist import comm

    own, firsts = comm.rank(), [ranks[0] for ranks in hosts]
    tensor = torch.zeros(int(megabytes * 2**20) // 4, device=comm.device())
    comm.all_sum(torch.zeros(1, device=comm.device()))  # NCCL connects all ranks before two talk alone
    found: Row = {"host": socket.gethostname()}
    inside = next(len(ranks) for ranks in hosts if own in ranks)
    if inside > 1:
        found["inside GB/s"] = 2 * (inside - 1) / inside * rate(tensor, partial(comm.sum_among, tensor, "host"))
    comm.barrier()
    if own in firsts and len(hosts) > 1 and len({len(ranks) for ranks in hosts}) == 1:
        across = len(hosts)
        found["between GB/s"] = 2 * (across - 1) / across * rate(tensor, partial(comm.sum_among, tensor, "hosts"))
    for pairs in rounds(firsts):
        comm.barrier()
        for peer in [a + b - own for a, b in pairs if own in (a, b)]:
            with_peer = rate(tensor, partial(comm.send_receive, tensor, peer))
            # Of its two links the better: the other may be slow for its neighbour's sake.
            found["link GB/s"] = max(found.get("link GB/s", 0.0), with_peer)
    return found


def rounds(ring: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring, in rounds where each has at most one partner.  Pure."""
    pairs = list(zip(ring, [*ring[1:], *ring[:1]], strict=True))
    if len(ring) < 3:
        return [pairs[:-1]]
    last = [[pairs.pop()]] if len(ring) % 2 else []
    return [pairs[0::2], pairs[1::2], *last]


def rate(tensor: Any, send: Callable[[], Any]) -> float:
    """GB/s at which ``send`` goes through with this tensor, and returns one.

    The median of some: the best of them falls where other pairs pause, which differs from host to host.
    """
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        float(send()[0])  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return tensor.nbytes / median(seconds[1:]) / 1e9


# Over ssh -------------------------------------------------------------------------------------------------------------


def over_ssh(request: Row, hostfile: str, port: int | None) -> int:
    """Ask every host of the hostfile at once, judge and say.  Returns the exit code."""
    hosts = hosts_in(Path(hostfile).read_text(encoding="utf-8"))
    with ThreadPoolExecutor(32) as pool:
        rows = list(pool.map(lambda host: ask(host, request | {"names": hosts}, port), hosts))
    print(f"{_many(len(hosts), 'host')}, asked over ssh from {socket.gethostname()}")
    faults = report(print, rows)
    print("\n" + (_many(len(faults), "fault") if faults else f"all {_many(len(hosts), 'host')} agree"))
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
    """The facts of a host, from this file run there."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *(["-p", str(port)] if port else [])]
    forwarded = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PYTHON")]  # as deepspeed
    there = shlex.join(["env", *forwarded, sys.executable, "-", "--facts", json.dumps(request)])
    source, asked = Path(__file__).read_text(encoding="utf-8"), time.time()
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


# The command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Look at every host of a job and name the odd one out.")
    parser.add_argument("--hostfile", help="without a launcher: ask these hosts over ssh (lines 'name slots=N')")
    parser.add_argument("--config", help="YAML file of the run, for its model.path and output_dir")
    parser.add_argument("--model", help="model folder to look at, instead of the config's")
    parser.add_argument("--output", help="output folder to look at, instead of the config's or this folder")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for all ranks to arrive, at least 5")
    parser.add_argument("--megabytes", type=float, help="MiB to measure bandwidth with, 0: do not; 64, on CPUs 16")
    parser.add_argument("--ssh_port", type=int, help="port of sshd on the hosts")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("--facts", type=json.loads, help=argparse.SUPPRESS)  # what a host is asked over ssh
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
    return {"root": str(root), "folder": os.getcwd(), "model": model, "output": output}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if there are faults, or if a rank cannot join."""
    arguments = parse(argv)
    if arguments.facts:
        with contextlib.suppress(OSError):  # named by the fact "folder"
            os.chdir(arguments.facts["folder"])
        print(json.dumps(facts(**arguments.facts)))
        return 0
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))  # works from a plain checkout too
    # Else c10d's stack traces bury what comm says of an address that cannot be reached. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        from lora_one_dist.launchers import resolve_launch

        request, launch = request_of(arguments, root), resolve_launch(os.environ)
        if arguments.hostfile and launch.source == "single process":
            return over_ssh(request, arguments.hostfile, arguments.ssh_port)
        from lora_one_dist import comm
    except Exception as error:  # half a launch environment, an unreadable file, or whatever a broken package raises
        rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
        print(f"rank {rank} on {socket.gethostname()} failed: {error}", file=sys.stderr)
        return 1
    try:
        return among_ranks(request, launch, arguments.timeout, arguments.megabytes)
    except Exception as error:
        comm.fail(error)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # as launch/train.py: the teardown of gloo's threads may abort a finished process
