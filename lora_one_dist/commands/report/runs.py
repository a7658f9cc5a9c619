"""The text files of run folders, read for tools/report.py: what a run was, what it logged, what it lacks.

In: folders as ``lora_one_dist.run`` leaves them, whole or not.  Out: a :class:`Run` each, with notes on what is
missing or damaged; and the best setting of each method.  Reads JSON and YAML only, no checkpoint and no torch: it runs
wherever the files are.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

RUN_FILES = ("run.json", "metrics.jsonl")  # either makes a folder one of a run
INIT_PHASES = ("gradient", "gather weights", "svd", "broadcast", "set adapters")
# Settings that do not tell runs apart: where a run is, and what happens when it fails.
NOT_COMPARED = ("output_dir", "resume", "comm", "checkpoint")
COMMIT_DIGITS = 10
MISSING = "-"
SCORES = {"exact_match": "exact match", "matthews": "Matthews"}  # of held-out answers, and what they are called


class ReportError(ValueError):
    """A folder that cannot be reported on or written to: which, why, and what to do."""


@dataclass
class Run:
    """One run folder."""

    folder: Path
    name: str
    """Path below what all runs of the report share."""
    number: int = 0
    """From 1, in the order of the report; figures and tables name the run by it."""
    about: dict[str, Any] = field(default_factory=dict)
    """run.json; empty where there is none."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings by dotted key."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl."""
    summary: dict[str, Any] | None = None
    """summary.json; None of a run that has not reached its end."""
    init: dict[str, Any] | None = None
    """init_report.json."""
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.number} {self.name}"

    @property
    def method(self) -> str:
        """init.method, or the adapter that the run started from; or full, where every weight is trained."""
        if self.config.get("train.mode") == "full":
            return "full"
        return str(self.config.get("init.adapter") or self.config.get("init.method", "unknown"))

    @property
    def r(self) -> int | None:
        value = self.config.get("lora.r")
        return value if isinstance(value, int) else None

    @property
    def facts(self) -> dict[str, str]:
        """What may tell this run from another: settings, and where it ran."""
        settings = {key: shown(value) for key, value in self.config.items() if compared(key)}
        if not self.about:
            return settings
        versions = self.about.get("versions") or {}
        return {
            **settings,
            "ranks": shown(self.about.get("world_size")),
            "device": shown(self.about.get("device")),
            "commit": short_commit(self.about.get("commit")),
            "ZeRO JSON": shown(flatten(self.about.get("deepspeed") or {})),
            **{f"version of {name}": shown(version) for name, version in versions.items()},
        }

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged number, without those that are not finite."""
        points = [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]
        return [step for step, _ in points], [float(value) for _, value in points]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total(self) -> int | None:
        """Steps that the run has, if that is known: epochs alone do not say it."""
        total = self.summary["steps"] if self.summary is not None else self.config.get("train.max_steps")
        return total if isinstance(total, int) else None

    def result(self, when: str, key: str) -> float | None:
        """``eval_loss`` or one of SCORES, ``before`` or ``after``: the summary's, before else that of step 0."""
        value = self.summary[when].get(key) if self.summary is not None else None
        if value is None and when == "before":
            value = next((line.get(key) for line in self.lines if line["step"] == 0), None)
        return float(value) if is_number(value) else None

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """Rows of the summary by name of the phase."""
        rows = self.summary["phases"] if self.summary is not None else []
        return {row["phase"]: row for row in rows}

    @property
    def init_seconds(self) -> float | None:
        """Seconds from the gradient to the adapters set, of the start that the summary tells of."""
        seconds = [row["seconds"] for name, row in self.phases.items() if name in INIT_PHASES]
        return sum(seconds) if seconds else None

    @property
    def peak_bytes(self) -> int | None:
        """Of the fullest rank in any phase, or as logged while training."""
        peaks = [row["peak_bytes"] for row in self.phases.values()] + [int(x) for x in self.series("peak_bytes")[1]]
        return max(peaks, default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged lines."""
        speeds = self.series("tokens_per_second")[1]
        return statistics.median(speeds) if speeds else None

    @property
    def covered_layers(self) -> list[dict[str, Any]]:
        """Rows of the init report that have an SVD, coverage by whole numbers."""
        rows = (self.init or {}).get("layers", [])
        return [
            {**row, "coverage": {int(k): v for k, v in row["coverage"].items()}} for row in rows if "coverage" in row
        ]


# Reading --------------------------------------------------------------------------------------------------------------


def find(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run's or one that holds runs at any depth, in order, each once.

    Raises:
        ReportError: if one holds none.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        found = [folder.resolve() for folder in _below(path)] if path.is_dir() else []
        if not found:
            what = f"holds no run ({' or '.join(RUN_FILES)}), at no depth" if path.is_dir() else "is no folder"
            raise ReportError(f"{path}: {what}. Give the output_dir of a run, or a folder of such folders.")
        folders |= dict.fromkeys(found)
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs = [read(folder, str(folder.relative_to(shared))) for folder in folders]
    for number, run in enumerate(runs, start=1):
        run.number = number
    return runs


def _below(path: Path) -> Iterator[Path]:
    """Run folders in a folder, itself included; nothing inside a run is looked at."""
    for folder, inner, files in os.walk(path):
        inner.sort()
        if any(name in files for name in RUN_FILES):
            inner.clear()
            yield Path(folder)


def read(folder: Path, name: str) -> Run:
    """A run from its folder; what is missing or damaged becomes a note."""
    run = Run(folder, name)
    run.about = _read_object(run, "run.json", ()) or {}
    run.config = _read_config(run)
    run.lines = _read_lines(run)
    run.summary = _read_object(run, "summary.json", ("steps", "before", "after", "phases"))
    run.init = _read_object(run, "init_report.json", ("layers",))
    run.notes += _progress_notes(run) + _content_notes(run)
    return run


def _read_object(run: Run, name: str, needed: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if name == "run.json":
            run.notes.append("run.json is missing: versions, commit and hardware are unknown")
        return None
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read ({error}): left out")
        return None
    lacks = [key for key in needed if key not in value] if isinstance(value, dict) else list(needed) or ["an object"]
    if lacks:
        run.notes.append(f"{name} lacks {', '.join(lacks)}: left out")
        return None
    return value


def _read_config(run: Run) -> dict[str, Any]:
    """config.yaml, or the settings that run.json repeats."""
    try:
        value = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
        why = None if isinstance(value, dict) else "holds no settings"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    if why is None:
        return flatten(value)
    repeated = (run.about.get("identity") or {}).get("config")
    run.notes.append(f"config.yaml {why}: the settings are {'those in run.json' if repeated else 'unknown'}")
    return flatten(repeated or {})


def _read_lines(run: Run) -> list[dict[str, Any]]:
    try:
        content = (run.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        run.notes.append(f"metrics.jsonl {why}: no curves")
        return []
    lines, damaged = [], []
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and type(value.get("step")) is int:
            lines.append(value)
        else:
            damaged.append(number)
    if damaged:
        run.notes.append(f"metrics.jsonl: line {', '.join(map(str, damaged))} is cut or damaged, left out")
    return lines


def _progress_notes(run: Run) -> list[str]:
    """How far it came; a summary that an earlier, shorter start has left is dropped."""
    notes = []
    starts = len(run.about.get("earlier_starts") or []) + 1
    went_on = run.about.get("resumed_from")
    if starts > 1 or went_on is not None:
        on = "at the beginning" if went_on is None else f"from step {went_on}"
        notes.append(f"started {starts} times, the last {on}: seconds and memory by phase are of that start alone")
    longest = max(run.last_step, run.config.get("train.max_steps") or 0)
    if run.summary is not None and run.summary["steps"] < longest:
        notes.append(f"summary.json is of an earlier start with {run.summary['steps']} steps: left out")
        run.summary = None
    if run.summary is None:
        of = "" if run.total is None else f" of {run.total}"
        notes.append(f"not finished: step {run.last_step}{of} is the last logged; it runs, was stopped, or crashed")
    return notes


def _content_notes(run: Run) -> list[str]:
    notes = []
    if run.init is None and run.method != "full":
        notes.append("no init_report.json: nothing on the initialisation")
    elif run.init is not None and not run.covered_layers:
        notes.append(f"{run.method} takes no SVD: no coverage and no certified error")
    if not run.series("eval_loss")[0]:
        no_data = "data.eval" in run.config and run.config["data.eval"] is None
        notes.append("no held-out data: no evaluation" if no_data else "no evaluation was logged")
    logged = [line["loss"] for line in run.lines if "loss" in line]
    lost = sum(not is_number(value) for value in logged)
    if lost:
        notes.append(f"{lost} logged losses are not finite: not drawn")
    return notes


def scored(runs: Sequence[Run]) -> dict[str, str]:
    """The SCORES to show of these runs: exact match, and others that one of them has."""
    return {k: name for k, name in SCORES.items() if k == "exact_match" or any(run.series(k)[0] for run in runs)}


# Comparing ------------------------------------------------------------------------------------------------------------


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def compared(key: str) -> bool:
    return key.partition(".")[0] not in NOT_COMPARED


def is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and math.isfinite(value)


def shown(value: Any) -> str:
    """A setting as text."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(inner)}" for key, inner in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def short_commit(commit: Any) -> str:
    """The first digits, and '+changes' if there were any."""
    digits, plus, changes = str(commit or "").partition("+")
    return digits[:COMMIT_DIGITS] + plus + changes or MISSING


def differing(runs: Sequence[Run]) -> list[str]:
    """Facts that are not the same in all runs; one that a run lacks altogether differs."""
    keys = dict.fromkeys(key for run in runs for key in run.facts)
    return [key for key in keys if len({run.facts.get(key) for run in runs}) > 1]


@dataclass
class Best:
    """The setting of one method with the lowest held-out loss, averaged over its runs."""

    method: str
    runs: list[Run]
    """Alike but for the seed."""
    tried: int
    """Settings of the method that have a finished run."""

    def values(self, key: str) -> list[float]:
        return [value for run in self.runs if (value := run.result("after", key)) is not None]

    @property
    def seeds(self) -> list[str]:
        return [shown(run.config.get("train.seed")) for run in self.runs]


def best_of_methods(runs: Sequence[Run]) -> list[Best]:
    """The best of each method over the finished runs that have a held-out loss, best method first."""
    methods: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.result("after", "eval_loss") is not None:
            same = {key: value for key, value in run.config.items() if compared(key) and key != "train.seed"}
            methods.setdefault(run.method, {}).setdefault(json.dumps(same, sort_keys=True), []).append(run)
    best = []
    for method, settings in methods.items():
        candidates = [Best(method, group, len(settings)) for group in settings.values()]
        best.append(min(candidates, key=lambda candidate: statistics.mean(candidate.values("eval_loss"))))
    return sorted(best, key=lambda candidate: statistics.mean(candidate.values("eval_loss")))
