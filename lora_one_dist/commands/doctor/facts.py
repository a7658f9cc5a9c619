"""What this host has: standard library only, as over ssh this file alone is sent to each host and run there.

In: a request, the arguments of :func:`facts` (as ``python - REQUEST``, in JSON).  Out: a :data:`Row`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Facts of one rank, or of one host over ssh, by name; or the "error" that kept them away."""

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
VARIABLES = re.compile(r"(NCCL|GLOO|TORCH|HF)_.*|DS_ACCELERATOR|OMP_NUM_THREADS")
UNKNOWN = "nothing"  # what a name that cannot be resolved resolves to
CONNECT_SECONDS = 5


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
    files = sorted([*root.glob("lora_one_dist/**/*.py"), *root.glob("launch/*.py"), root / "tools/doctor.py"])
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
    return counted(listed.splitlines())


def counted(kinds: Sequence[str]) -> str:
    """'8 x NVIDIA H200, 2 x NVIDIA H100'."""
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


def print_facts(request: Row) -> None:
    """On one line, from the folder where the job starts."""
    with contextlib.suppress(OSError):  # named by the fact "folder"
        os.chdir(request["folder"])
    print(json.dumps(facts(**request)))


if __name__ == "__main__":
    print_facts(json.loads(sys.argv[1]))
