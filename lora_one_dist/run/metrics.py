"""What a run tells: progress on rank 0, ``metrics.jsonl``, TensorBoard, seconds and peak bytes per phase, the report.

In: numbers.  Out: files in the run folder and lines on rank 0's standard output.  Every rank constructs and calls the
same things; only rank 0 writes.  Nothing here is collective except where said.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.base.head import why_whole
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.disk import folders

QUEUED = 32  # numbers that TensorBoard takes before it writes: more than a logged step has, which waits for no disk
PEAK_OPERATIONS = {  # by a part of the GPU's name; the first that fits
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "H200": 9.89e14,
    "GH200": 9.89e14,
    "A100": 3.12e14,
}

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate", "safetensors")
MIB = 2**20
PROGRESS_SECONDS = 5.0
SHARED_SECONDS = 60.0  # for a file to show on another host: NFS remembers for so long that there was none


class Teller:
    """Lines on rank 0's standard output."""

    def __init__(self, writes: bool):
        """
        Args:
            writes: on rank 0; the others' calls do nothing.
        """
        self.writes = writes
        self.begun: dict[str, float] = {}
        self.last_line = 0.0

    def say(self, message: str) -> None:
        """One line of progress."""
        if self.writes:
            print(message, flush=True)

    def progress(self, label: str, done: int, total: int) -> None:
        """Progress of long work, at most one line every PROGRESS_SECONDS and one at its end, with the time left."""
        now = time.monotonic()
        if done == 1 or label not in self.begun:
            self.begun[label] = self.last_line = now
        if done == total or now - self.last_line >= PROGRESS_SECONDS:
            self.last_line = now
            spent = now - self.begun[label]
            # The first unit's time is not known: it ended when this was first called.
            left = f", {spent / (done - 1) * (total - done):.0f} s left" if 1 < done < total else ""
            self.say(f"{label} {done}/{total}{left}")


class RunFolder(Teller):
    """The record of one run, which may be that of several processes one after another."""

    def __init__(
        self, root: Path, writes: bool, step: int | None = None, keep_bytes: int = 0, stop_on_failure: bool = True
    ):
        """
        Args:
            writes: on rank 0; the others' calls do nothing.
            step: gone on from, whose lines are the first ``keep_bytes`` of metrics.jsonl; None: a new start.
            stop_on_failure: raise the OSError of a line that the disk does not take; else warn and try again with the
                next line.
        """
        super().__init__(writes)
        self.root = root
        self.stop_on_failure = stop_on_failure
        self.board: Any = None
        self.complained = False
        if writes:
            from torch.utils.tensorboard import SummaryWriter

            root.mkdir(parents=True, exist_ok=True)
            self.lines = (root / "metrics.jsonl").open("ab", buffering=0)
            self.pending = b""  # what the disk has not taken yet
            if self.lines.tell() > keep_bytes:
                self.lines.truncate(keep_bytes)
            self.board = SummaryWriter(str(root / "tensorboard"), max_queue=QUEUED, purge_step=step or 0)
            for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                if (own := values.pop("step")) == step:  # purged with what came after the checkpoint
                    self._show(own, values)

    def say_how_loss_is_taken(self, model: Any) -> None:
        """Where it is not in pieces: why, which memory depends on.  After a pass of the model."""
        if (why := why_whole(model)) is not None:
            self.say(f"the loss takes the logits of all rows with a target at once: {why}")

    def write_json(self, name: str, value: Any) -> None:
        """A file of the run folder."""
        if self.writes:
            folders.replace_file(self.root / name, json.dumps(value, indent=1) + "\n")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers in TensorBoard."""
        if not self.writes:
            return
        self.pending += (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            self._write_pending()
            self._show(step, values)
            self.complained = False
        except OSError as error:
            if self.stop_on_failure:
                raise
            if not self.complained:
                self.say(f"warning: metrics.jsonl and TensorBoard cannot be written: {error}. The run goes on.")
            self.complained = True

    def _write_pending(self) -> None:
        while self.pending:
            self.pending = self.pending[self.lines.write(self.pending) :]

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        """In TensorBoard, which leaves out what its disk does not take."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.board = self.board or SummaryWriter(str(self.root / "tensorboard"), max_queue=QUEUED)
            for key, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(key, value, step)
        except OSError:
            self.board = None  # its thread has ended: another file the next time
            raise

    def size_bytes(self) -> int:
        """Of metrics.jsonl so far."""
        if self.writes:
            with contextlib.suppress(OSError):
                self._write_pending()
        return os.fstat(self.lines.fileno()).st_size if self.writes else 0

    def close(self) -> None:
        """Flush what is open."""
        if self.writes:
            try:
                self._write_pending()
                self.lines.close()
                if self.board is not None:
                    self.board.close()
            except OSError as error:
                if self.stop_on_failure:
                    raise
                self.say(f"warning: the last lines of metrics.jsonl cannot be written: {error}")


def refuse_unshared(path: Path, token: str) -> None:
    """Raise UnsharedFolderError if this rank does not find what rank 0 has written.  Not collective."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8"))["id"] == token:
                return
        if time.monotonic() > deadline:
            raise UnsharedFolderError(
                f"output_dir = {path.parent}: {socket.gethostname()} does not see there what rank 0 has written. All "
                "ranks write their part of a checkpoint: give a folder on a file system that all hosts share."
            )
        time.sleep(0.5)


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_run(config: Config, launch: comm.Launch, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Versions, commit, hardware and launch of this start of a run, an id, and those of its earlier starts."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    starts = []
    if earlier is not None:
        last = {key: value for key, value in earlier.items() if key not in ("identity", "earlier_starts")}
        starts = [*earlier.get("earlier_starts", []), last]
    return {
        "id": secrets.token_hex(8),
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "device": device,
        "launch": launch.source,
        "world_size": launch.world_size,
        "deepspeed": config.deepspeed.policy(),
        "earlier_starts": starts,
    }


def _commit() -> str | None:
    """The commit of this checkout, with '+changes' if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class UnsharedFolderError(ValueError):
    """The output folder is not the same on all hosts."""


class Phases:
    """Seconds and peak bytes of named phases of this rank; a phase entered again adds its seconds.

    Peak bytes are those of the GPU's allocator, or on a CPU of the process (resident, imports included).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_bytes()
        started = time.monotonic()
        try:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # not after an error: collectives that peers never join would never end
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak_bytes())

    def over_ranks(self) -> list[dict[str, Any]]:
        """A row per phase with the slowest rank's seconds and the largest peak.  Collective."""
        ranks = comm.all_gather_object((self.seconds, self.peak_bytes))
        return [
            {
                "phase": name,
                "seconds": max(seconds[name] for seconds, _ in ranks),
                "peak_bytes": max(peak[name] for _, peak in ranks),
            }
            for name in self.seconds
        ]


def spread_over_ranks(seconds: Sequence[float]) -> dict[str, Any]:
    """Slowest and fastest rank of a step by their own seconds, and the largest memory.  Collective."""
    slowest, fastest = max(seconds), min(seconds)
    on_gpu = {}
    if torch.cuda.is_available():  # near its end the allocator gives back and takes again: slow, and no error yet
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        on_gpu = {"reserved_bytes": torch.cuda.max_memory_reserved(), "alloc_retries": retries}
    return {
        **on_gpu,
        "slowest_rank": seconds.index(slowest),
        "slowest_rank_seconds": slowest,
        "fastest_rank": seconds.index(fastest),
        "fastest_rank_seconds": fastest,
        "peak_bytes": int(max(comm.all_gather_floats(peak_bytes()))),
    }


def peak_operations() -> float | None:
    """A second, of this rank's GPU in dense bf16 as its maker says; None for a CPU or a GPU that is not listed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for kind, peak in PEAK_OPERATIONS.items() if kind in name), None)


def reset_peak_bytes() -> None:
    """Start a new peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # some containers forbid it; the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak since the last reset: GPU allocations, or resident host memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def init_summary(rows: Sequence[Mapping[str, Any]], tokens: int, r: int) -> list[str]:
    """Lines for people of the init report: coverage at each layer's r, certificate, agreement of the halves, warnings.

    r: ``lora.r``.
    """
    rows = [row for row in rows if "coverage" in row]
    if not rows:
        return []
    lines = []
    ranks = sorted({row.get("r", r) for row in rows})  # reports of before patterns tell none
    at = [row["coverage"][own] for row in rows if (own := row.get("r", r)) in row["coverage"]]
    if at:
        mean = sum(at) / len(at)
        named = f"{r}" if ranks == [r] else f"{ranks[0]} to {ranks[-1]}"
        lines.append(f"rank {named} covers {min(at):.0%} to {max(at):.0%} of a layer's energy, {mean:.0%} on average")
    worst = max(rows, key=lambda row: row["certified_error"])
    lines.append(f"largest certified error of a top space {worst['certified_error']:.1e} ({worst['name']})")
    overlaps = [row["half_overlap"] for row in rows if row["half_overlap"] is not None]
    if overlaps:
        lines.append(
            f"top-{r} spaces of the batch's halves overlap by {sum(overlaps) / len(overlaps):.0%} on average "
            "(100 %: more samples change nothing)"
        )
    if tokens and tokens < r:
        lines.append(
            f"warning: the init batch has {tokens} target tokens, fewer than lora.r = {r}: its gradient has no more "
            "directions than tokens. Raise init.num_samples."
        )
    return lines


def plot_report(rows: Sequence[Mapping[str, Any]], path: Path, r: int) -> None:
    """A picture to choose r by: energy covered by rank for each kind of layer, and at r along the depth."""
    rows = [row for row in rows if "coverage" in row]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["name"].rpartition(".")[2], []).append(row)
    figure, (by_rank, by_depth) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for kind, layers in kinds.items():
        ranks = sorted(set.intersection(*(set(row["coverage"]) for row in layers)))
        means = [sum(row["coverage"][k] for row in layers) / len(layers) for k in ranks]
        by_rank.plot(ranks, means, marker="o", markersize=3, label=kind)
        shown = [(depth, row["coverage"][r]) for depth, row in enumerate(layers) if r in row["coverage"]]
        by_depth.plot(*zip(*shown, strict=True), marker=".", label=kind) if shown else None
    by_rank.axvline(r, color="grey", linestyle=":", label=f"lora.r = {r}")
    by_rank.set(xlabel="rank", ylabel="share of energy covered", ylim=(0, 1.02), title="mean over layers")
    by_rank.set_xscale("log", base=2)
    by_rank.xaxis.set_major_formatter("{x:.0f}")
    by_depth.xaxis.get_major_locator().set_params(integer=True)
    by_depth.set(xlabel="layer", ylabel="share of energy covered", ylim=(0, 1.02), title=f"along the depth, rank {r}")
    by_rank.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def final_table(title: str, before_after: Sequence[tuple[str, Any, Any]], phases: Sequence[Mapping[str, Any]]) -> str:
    """The short table at the end of a run."""
    lines = ["", title, f"  {'':<28}{'before':>12}{'after':>12}"]
    for name, before, after in before_after:
        cells = "".join(f"{'-' if value is None else format(value, '.4f'):>12}" for value in (before, after))
        lines.append(f"  {name:<28}{cells}")
    kind = "GPU memory" if torch.cuda.is_available() else "host memory, imports included"
    lines += ["", f"  {'phase':<28}{'seconds':>12}{'peak MiB':>12}   (slowest rank; largest {kind})"]
    lines += [f"  {row['phase']:<28}{row['seconds']:>12.1f}{row['peak_bytes'] / MIB:>12.0f}" for row in phases]
    return "\n".join(lines)
