"""What :mod:`defaults` has found: every run, tables and plots.

In: a :class:`defaults.Runs`, done or not.  Out: runs.jsonl, tables.md and PNGs in one folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lora_one_dist.commands import markdown

if TYPE_CHECKING:
    from tools.study.defaults import Runs, Stage, Variant

BASELINE = "none"
DPI = 80
TRACED = {
    "gram_B": "mean eigenvalue of B'B",
    "rms_step_A": "entry of lora_A's step, over the rate",
    "rms_moved": "entry of B dA + dB A, over the rate",
    "weak_share": "share of the step in the weakest quarter of B'B",
    "weak_share_of_gradient": "the same of the raw gradient",
}


def write(runs: Runs, stages: Sequence[Stage], results: Path) -> None:
    """All files of the report."""
    results.mkdir(parents=True, exist_ok=True)
    rows = {stage.name: run_rows(runs, stage) for stage in stages}
    unique = dict.fromkeys(json.dumps(row) for own in rows.values() for row in own)
    text = "".join(f"{line}\n" for line in unique)
    (results / "runs.jsonl").write_text(text, encoding="utf-8")
    parts = [head(runs, len(unique))]
    parts += [f"## {stage.name.capitalize()}\n\n{stage_text(runs, stage, rows[stage.name])}" for stage in stages]
    parts.append(f"## What happens inside\n\n{trace_text(runs, stages)}")
    (results / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_traces(runs, stages, results / "steps.png")


def run_rows(runs: Runs, stage: Stage) -> list[dict[str, Any]]:
    """Every run of a stage that was started, failed ones too."""
    found = []
    for cell in stage.cells:
        for variant in stage.variants:
            best = runs.best(cell, variant)
            tried = {(rate, 0) for rate in runs.tried(cell, variant)}
            tried |= {(best, seed) for seed in range(1, stage.fresh + 1) if best is not None}
            for rate, seed in sorted(tried):
                point = runs.point(cell, variant, rate, seed)
                summary, failure = point.summary(), runs.failures().get(point.name)
                if summary is None and failure is None:
                    continue
                row = {"cell": cell, "variant": variant.name, "lr": rate, "seed": seed}
                if summary is None:
                    found.append({**row, "failed": failure})
                    continue
                seconds = round(sum(phase["seconds"] for phase in summary["phases"]), 1)
                found.append({**row, "eval_loss": summary["after"]["eval_loss"], "seconds": seconds})
    return found


def losses(runs: Runs, cell: str, variant: Variant, stage: Stage) -> dict[int, float]:
    """By seed, at the best rate: seed 0, which chose it; or of a stage with fresh seeds those alone."""
    best, seeds = runs.best(cell, variant), range(1, stage.fresh + 1) if stage.fresh else (0,)
    found = {} if best is None else {seed: runs.loss(cell, variant, best, seed) for seed in seeds}
    return {seed: loss for seed, loss in found.items() if loss is not None}


@dataclass(frozen=True)
class Against:
    """A variant's losses beside the baseline's: log ratios by cell and seed, of the seeds that both have."""

    ratios: Mapping[str, Mapping[int, float]]

    def mean_and_error(self, cells: Sequence[str]) -> tuple[float, float] | None:
        """Of the mean log ratio over cells, and its standard error over seeds; None if a cell is missing."""
        if not all(self.ratios.get(cell) for cell in cells):
            return None
        seeds = set.intersection(*(set(self.ratios[cell]) for cell in cells))
        means = [fmean(self.ratios[cell][seed] for cell in cells) for seed in sorted(seeds)]
        if not means:
            return None
        return fmean(means), stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def against_baseline(runs: Runs, stage: Stage, variant: Variant) -> Against:
    """Each cell's log ratios to the stage's baseline at its own best rate, seed by seed."""
    plain = next(v for v in runs.all_variants() if v.name == stage.baseline)
    found = {}
    for cell in stage.cells:
        own, other = (losses(runs, cell, v, stage) for v in (variant, plain))
        found[cell] = {seed: math.log(own[seed] / other[seed]) for seed in own.keys() & other.keys()}
    return Against(found)


def head(runs: Runs, count: int) -> str:
    """What was measured, on what."""
    known: dict[str, Any] = {}
    for path in sorted((runs.out / "defaults" / "runs").glob("*/*/run.json"))[:1]:
        known = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    bases = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs.out.glob("base-*/base.json"))]
    shown = ", ".join(f"{b['parameters']} parameters (held-out loss {b['held_out_loss']:.3f})" for b in bases)
    return (
        "# Tables of the defaults' study\n\n"
        "Written by tools/study/defaults_report.py from the run folders; what they say is in README.md.\n\n"
        f"- {count} runs; {os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}; commit "
        f"{known.get('commit')}; {versions}\n- bases: {shown}"
    )


def stage_text(runs: Runs, stage: Stage, started: Sequence[Mapping[str, Any]]) -> str:
    """A row for each variant: least loss and its rate in every cell, and the mean ratio to the baseline's.

    ``started``: from :func:`run_rows`.
    """
    rows: list[tuple[float, dict[str, Any]]] = []
    ratio = f"of {stage.baseline}"
    for variant in stage.variants:
        row: dict[str, Any] = {"variant": variant.name}
        against = against_baseline(runs, stage, variant)
        for cell in stage.cells:
            own = losses(runs, cell, variant, stage)
            row[cell] = f"{fmean(own.values()):.4f} ({runs.best(cell, variant):g})" if own else ""
            if stage.fresh and variant.name != stage.baseline:
                row[cell] += _percent(against.mean_and_error([cell]))
        mean = against.mean_and_error(stage.cells)
        row[ratio] = "" if mean is None else f"{math.exp(mean[0]):.3f}"
        if stage.fresh:
            row["verdict"] = "" if variant.name == stage.baseline else verdict(against, stage.cells)
            if mean is not None and variant.name != stage.baseline:
                row[ratio] += f" ± {mean[1]:.3f}"
        rows.append((math.inf if mean is None else mean[0], row))
    if not stage.fresh:
        rows.sort(key=lambda entry: entry[0])
    told = (
        f"Mean over seeds 1 to {stage.fresh}, which chose nothing, at the rate that was best at seed 0; behind it the "
        "difference from the baseline in per cent, paired by seed, ± its standard error. Of ...: geometric mean of the "
        "ratios over cells. Verdict: by the plan's rule, two standard errors."
        if stage.fresh
        else "Least held-out loss over the rates at seed 0, and its rate. Of none: geometric mean of ratios over cells."
    )
    failed = [f"{row['cell']}, {row['variant']}, {row['lr']:g}" for row in started if "failed" in row]
    ending = "\n\nFailed: " + "; ".join(failed) if failed else ""
    return f"{told}\n\n{markdown.table([row for _, row in rows])}{ending}"


def _percent(mean: tuple[float, float] | None) -> str:
    return "" if mean is None else f" {100 * mean[0]:+.1f} ± {100 * mean[1]:.1f} %"


def verdict(against: Against, cells: Sequence[str]) -> str:
    """wins: better on average by more than two standard errors, and in no cell worse by as much; loses: the reverse."""
    every = [against.mean_and_error([cell]) for cell in cells]
    mean = against.mean_and_error(cells)
    if mean is None or any(one is None for one in every):
        return "missing runs"
    worse = [cell for cell, one in zip(cells, every, strict=True) if one is not None and one[0] > 2 * one[1]]
    better = [cell for cell, one in zip(cells, every, strict=True) if one is not None and one[0] < -2 * one[1]]
    if mean[0] < -2 * mean[1] and not worse:
        return "wins"
    if mean[0] > 2 * mean[1] and not better:
        return "loses"
    return "tie" + (f", worse on {', '.join(worse)}" if worse else "")


def traces(runs: Runs, cell: str, variant: Variant, rate: float) -> list[Mapping[str, float]]:
    """What train_form.py has written of a run at the first seed."""
    folder = runs.point(cell, variant, rate, 0).folder
    path = folder.with_name(f"{folder.name}.trace.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def trace_text(runs: Runs, stages: Sequence[Stage]) -> str:
    """First and last step of every form at one rate, on one cell."""
    cell, rows = stages[0].cells[0], []
    for variant in stages[0].variants:
        best = runs.best(cell, variant)
        kept = traces(runs, cell, variant, best) if best is not None else []
        if kept:
            row: dict[str, Any] = {"form": variant.name, "rate": f"{best:g}"}
            rows.append({**row, **{text: f"{kept[0][k]:.2g} > {kept[-1][k]:.2g}" for k, text in TRACED.items()}})
    told = f"{cell}, every form at its best rate: at the first step > at the last that was traced."
    return f"{told}\n\n{markdown.table(rows)}" if rows else "No run of this commit's settings is there."


def plot_traces(runs: Runs, stages: Sequence[Stage], path: Path) -> None:
    """Size of the Gram and of the steps over time, some forms at the rate that is best for none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cell = stages[0].cells[0]
    rate = runs.best(cell, next(v for v in stages[0].variants if v.name == BASELINE)) or 0.0
    shown = [v for v in stages[0].variants if v.name in ("none", "paper", "damping 0.1", "rescaled", "after")]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, key in zip(panels, ("gram_B", "rms_step_A"), strict=True):
        for variant in shown:
            kept = traces(runs, cell, variant, rate)
            if kept:
                axes.plot([row["step"] for row in kept], [row[key] for row in kept], label=variant.name)
        axes.set(xlabel="step", ylabel=TRACED[key], yscale="log")
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"{cell}, rate {rate:g}")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
