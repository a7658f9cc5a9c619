"""Many runs of launch/train.py over a grid of settings, on what is free; a table and a plot of what came out.

    python tools/sweep.py --config launch/configs/demo.yaml --out runs/sweep \
        optim.lr=1e-3,2e-3,5e-3 init.method=lora,lora_one train.seed=0,1 lora.r=4
    python tools/sweep.py --config mine.yaml --out runs/mine --points points.yaml --x optim.damping

A setting with several values, separated by commas, is an axis of the grid; one with a single value holds for all runs.
Values are YAML, and brackets and quotes hold commas together: optim.betas=[0.9,0.99],[0.9,0.999].  --points names a
YAML list of mappings, key.sub: value, each of which is combined with the grid.

Every config is checked before the first run starts.  A run that is done is not done again, one that was cut off goes
on, one that failed is recorded with the end of its log and tried again by the next call; it stops no other.  CPU: as
many runs at once as --at_once says, one thread a rank.  GPUs: one run for every --ranks GPUs on which nothing runs.

Out: OUT/<name>/ and OUT/<name>.log of each run, sweep.jsonl, sweep.md and sweep.png.  Exit code 0: all runs are done;
1: some failed; 2: a problem in the configs, and nothing was started; 130: interrupted (Ctrl-C), all runs ended.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_one_dist.commands import sweep_report
from lora_one_dist.config import paths
from lora_one_dist.config.reading import ConfigError, load_config
from lora_one_dist.config.settings import Config

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
LOG_LINES = 5  # kept of a run that failed
POLL_SECONDS = 0.2
FREE_MIB = 512  # a GPU that holds no more than this is free
GRACE_SECONDS = 60.0  # for a run that is asked to stop to save itself
BAD_CONFIG, INTERRUPTED = 2, 130


class SweepError(ValueError):
    """Points that cannot be run: every problem, each as value, rule and remedy."""


@dataclass(frozen=True)
class Point:
    """One run."""

    name: str
    """Of its folder; another for any other config."""
    labels: Mapping[str, Any]
    """What sets it apart, as shown in tables."""
    config: Config
    arguments: tuple[str, ...]
    """Of the command line, from --config on."""
    script: Path = TRAIN

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.name + ".log")

    def summary(self) -> dict[str, Any] | None:
        """What the run has written at its end, if its resolved config was this one."""
        try:
            if (self.folder / "config.yaml").read_text(encoding="utf-8") != self.config.to_yaml():
                return None
            return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


# Points ---------------------------------------------------------------------------------------------------------------


def split_values(text: str) -> list[str]:
    """``a,b`` at the commas outside brackets and quotes.  Pure."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def expand(settings: Sequence[str], explicit: Sequence[Mapping[str, Any]] = ({},)) -> list[dict[str, str]]:
    """The settings that vary, for every point: each explicit set with each combination of the grid.  Pure.

    Raises:
        SweepError: a setting is no key=value, or stands in the grid and in an explicit set.
    """
    axes: dict[str, list[str]] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise SweepError(f"{setting!r}: must be key=value or key=value,value,... with a dotted key.")
        axes[key] = split_values(value)
    if twice := sorted({key for chosen in explicit for key in chosen} & axes.keys()):
        raise SweepError(f"{', '.join(twice)}: given by --points and on the command line. Leave it out of one.")
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [{**{key: _yaml(value) for key, value in chosen.items()}, **rest} for chosen in explicit for rest in grid]


def _yaml(value: Any) -> str:
    """A value on one line, as an override takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_points(path: Path) -> list[dict[str, Any]]:
    """The explicit sets of a --points file."""
    try:
        chosen = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SweepError(f"--points {path}: cannot be read as YAML: {error}.") from error
    if not isinstance(chosen, list) or not chosen or not all(isinstance(item, dict) and item for item in chosen):
        raise SweepError(f"--points {path}: must be a list of mappings, e.g. '- {{optim.lr: 1e-3, lora.r: 4}}'.")
    return chosen


def make_points(
    config: Path | str, out: Path, overrides: Sequence[Mapping[str, str]], script: Path = TRAIN
) -> list[Point]:
    """Check every config; the labels of a point are the settings in which the points differ.

    Raises:
        SweepError: with the problems of all points.
    """
    keys = list(dict.fromkeys(key for chosen in overrides for key in chosen))
    varied = [key for key in keys if len({chosen.get(key) for chosen in overrides}) > 1]
    points, problems = [], []
    for chosen in overrides:
        try:
            points.append(make_point(config, out, chosen, varied, script))
        except ConfigError as error:
            where = ", ".join(f"{key}={chosen.get(key)}" for key in varied)
            problems += [f"{where + ': ' if where else ''}{problem}" for problem in error.problems]
    if problems:
        raise SweepError("\n".join(f"  - {problem}" for problem in dict.fromkeys(problems)))
    names = [point.name for point in points]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SweepError(f"{', '.join(twice)}: the same run more than once. Give each value once.")
    return points


def make_point(
    config: Path | str,
    out: Path,
    chosen: Mapping[str, str],
    shown: Sequence[str],
    script: Path = TRAIN,
    more: Mapping[str, Any] | None = None,
) -> Point:
    """One run into a folder of ``out`` that is named after its labels and its whole config.

    The labels are ``more`` and the values of the settings ``shown``.
    """
    overrides = [f"{key}={value}" for key, value in chosen.items()]
    unplaced = load_config(config, [*overrides, "output_dir=unplaced"])
    labels = {**(more or {}), **{key: _value(unplaced, key) for key in shown}}
    digest = hashlib.sha256(f"{script.name}\n{unplaced.to_yaml()}".encode()).hexdigest()[:8]
    readable = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in labels.items())
    name = "_".join(filter(None, (re.sub(r"[^\w.-]+", "-", readable)[:80], digest)))
    overrides.append(f"output_dir={out / name}")
    return Point(name, labels, load_config(config, overrides), ("--config", str(config), *overrides), script)


def _value(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


# Running --------------------------------------------------------------------------------------------------------------


def free_slots(at_once: int, ranks: int) -> list[dict[str, str]]:
    """The environment of each run that may go on at one time: some free GPUs, or one thread a rank.

    Raises:
        SweepError: there are GPUs, but too few of them are free.
    """
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
        )
        lines = asked.stdout.splitlines() if asked.returncode == 0 else []
    except OSError:
        lines = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not lines or visible == "":
        return [{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}] * at_once
    used = dict(line.replace(" ", "").split(",") for line in lines)
    chosen = visible.split(",") if visible else list(used)
    free = [index for index in chosen if float(used.get(index, "inf")) <= FREE_MIB]
    if len(free) < ranks:
        raise SweepError(f"{len(free)} of the GPUs {', '.join(chosen)} are free, --ranks {ranks} need as many. Wait.")
    groups = [free[start : start + ranks] for start in range(0, len(free) - ranks + 1, ranks)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def command(point: Point, ranks: int) -> list[str]:
    """How a point is started."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(point.script), *point.arguments]


def run(
    points: Sequence[Point],
    at_once: int = 1,
    ranks: int = 1,
    say: Callable[[str], None] = print,
    start: Callable[[Point, int, Mapping[str, str]], Any] | None = None,
) -> dict[str, str]:
    """Run what is not done.  Returns the end of the log of each run that failed, by name.

    However it is left, no process that it started goes on.  ``start``: how a run becomes a process that leads a session
    of its own, in place of subprocess.Popen.
    """
    left = [point for point in points if point.summary() is None]
    say(f"{len(points)} runs, {len(points) - len(left)} done before, {len(left)} to do")
    slots = free_slots(at_once, ranks) if left else []
    start = start or _start
    going: list[tuple[Point, Any, dict[str, str], float]] = []
    failed: dict[str, str] = {}
    number, total = 0, len(left)
    try:
        while left or going:
            while left and slots:
                point, slot = left.pop(0), slots.pop()
                going.append((point, start(point, ranks, slot), slot, time.monotonic()))
            for entry in [entry for entry in going if entry[1].poll() is not None]:
                point, process, slot, began = entry
                going.remove(entry)
                slots.append(slot)
                number += 1
                ended = "done"
                if process.returncode != 0 or point.summary() is None:
                    failed[point.name] = "\n".join(_last_lines(point.log)) or "(its log is empty)"
                    ended = f"FAILED with {process.returncode}: {failed[point.name].splitlines()[-1]:.200}"
                say(f"{number}/{total}  {point.name}  {time.monotonic() - began:.0f} s  {ended}")
            time.sleep(POLL_SECONDS)
    finally:
        _end([process for _, process, _, _ in going])
    return failed


def _start(point: Point, ranks: int, slot: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own: the terminal's Ctrl-C is for the sweep, which ends what it started."""
    point.folder.parent.mkdir(parents=True, exist_ok=True)
    with point.log.open("ab") as log:
        return subprocess.Popen(
            command(point, ranks),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot},
            start_new_session=True,
        )


def _end(processes: Sequence[Any]) -> None:
    """Ask to stop, wait, kill: these processes and what they started, nothing else."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it ends by itself, or leads no group yet
                    os.killpg(process.pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(KeyboardInterrupt):  # a second one: do not wait, kill
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


def _last_lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=paths.argument, required=True, help="YAML that all runs start from")
    parser.add_argument("--out", type=paths.argument, required=True, help="folder of the sweep")
    parser.add_argument("--points", type=paths.argument, help="YAML list of settings, each combined with the grid")
    parser.add_argument("--at_once", type=int, default=1, help="runs at one time, without GPUs (1)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (1)")
    metrics = ["eval_loss", *sweep_report.HIGHER_IS_BETTER]
    parser.add_argument("--metric", default="eval_loss", choices=metrics, help="to choose by")
    parser.add_argument("--x", default="optim.lr", help="the setting that is chosen and plotted along (optim.lr)")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value[,value...]")
    return parser.parse_intermixed_args(argv)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM ends a sweep as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    args = parse()
    try:
        explicit = read_points(args.points) if args.points else [{}]
        points = make_points(args.config, args.out, expand(args.settings, explicit))
        with sigterm_interrupts():
            failed = run(points, args.at_once, args.ranks)
    except SweepError as error:
        print(f"nothing was started:\n{error}", file=sys.stderr)
        return BAD_CONFIG
    except KeyboardInterrupt:
        print("interrupted: all runs are ended; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(sweep_report.write(points, failed, args.out, args.metric, args.x))
    return 1 if failed else 0
