"""What :mod:`defaults` has found: every run, tables and plots.

In: a :class:`defaults.Runs`, done or not.  Out: runs.jsonl, tables.md and PNGs in one folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
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
    rows = [row for stage in stages for row in run_rows(runs, stage)]
    unique = {json.dumps(row): row for row in rows}
    text = "".join(f"{line}\n" for line in unique)
    (results / "runs.jsonl").write_text(text, encoding="utf-8")
    parts = [head(runs, len(unique))]
    parts += [f"## {stage.name.capitalize()}\n\n{stage_text(runs, stage)}" for stage in stages]
    parts.append(f"## What happens inside\n\n{trace_text(runs, stages)}")
    (results / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_traces(runs, stages, results / "steps.png")


def run_rows(runs: Runs, stage: Stage) -> list[dict[str, Any]]:
    """Every run of a stage that was started, failed ones too."""
    found = []
    for cell in stage.cells:
        for variant in stage.variants:
            tried = {(rate, 0) for rate in runs.tried(cell, variant)}
            best = runs.best(cell, variant)
            tried |= {(best, seed) for seed in range(1, stage.seeds) if best is not None}
            for rate, seed in sorted(tried):
                point = runs.point(cell, variant, rate, seed)
                summary = point.summary()
                if summary is None and point.name not in runs.failed:
                    continue
                row = {"cell": cell, "variant": variant.name, "lr": rate, "seed": seed}
                seconds = None if summary is None else round(sum(phase["seconds"] for phase in summary["phases"]), 1)
                loss = None if summary is None else summary["after"]["eval_loss"]
                found.append({**row, "eval_loss": loss, "seconds": seconds})
    return found


def losses(runs: Runs, cell: str, variant: Variant, seeds: int) -> list[float]:
    """At the best rate, by seed, as far as they are there."""
    best = runs.best(cell, variant)
    if best is None:
        return []
    found = [runs.loss(cell, variant, best, seed) for seed in range(seeds)]
    return [loss for loss in found if loss is not None]


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


def stage_text(runs: Runs, stage: Stage) -> str:
    """A row for each variant: least loss and its rate in every cell, and the mean ratio to plain AdamW's."""
    plain = next((v for v in runs.all_variants() if v.name == BASELINE), None)
    table, failed = [], []
    for variant in stage.variants:
        row: dict[str, Any] = {"variant": variant.name}
        ratios = []
        for cell in stage.cells:
            own, best = losses(runs, cell, variant, stage.seeds), runs.best(cell, variant)
            against = losses(runs, cell, plain, stage.seeds) if plain is not None else []
            row[cell] = f"{fmean(own):.4f} ({best:g})" if own else ""
            if len(own) > 1 and len(own) == len(against) and variant is not plain:
                gaps = [a - b for a, b in zip(own, against, strict=True)]
                row[cell] += f" {fmean(gaps):+.4f} ± {stdev(gaps) / math.sqrt(len(gaps)):.4f}"
            if own and against:
                ratios.append(math.log(fmean(own) / fmean(against)))
        row["mean ratio to none"] = f"{math.exp(fmean(ratios)):.3f}" if ratios else ""
        table.append(row)
    if stage.seeds == 1:
        table.sort(key=lambda row: row["mean ratio to none"] or "9")
    failed = [point.name for point in runs.points.values() if point.name in runs.failed]
    told = (
        f"Mean over {stage.seeds} seeds at the best rate of seed 0; behind it the difference from none, paired by "
        "seed, ± its standard error."
        if stage.seeds > 1
        else "Least held-out loss over the rates, and its rate; seed 0."
    )
    ending = "\n\nFailed: " + "; ".join(sorted(set(failed))) if failed else ""
    return f"{told}\n\n{markdown.table(table)}{ending}"


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
    return f"{told}\n\n{markdown.table(rows)}"


def plot_traces(runs: Runs, stages: Sequence[Stage], path: Path) -> None:
    """Size of the Gram and of the steps over time, some forms at the rate that is best for none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cell = stages[0].cells[0]
    shown = [v for v in stages[0].variants if v.name in ("none", "paper", "damping 0.1", "rescaled", "after")]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, key in zip(panels, ("gram_B", "rms_step_A"), strict=True):
        for variant in shown:
            kept = traces(runs, cell, variant, 3e-3)
            if kept:
                axes.plot([row["step"] for row in kept], [row[key] for row in kept], label=variant.name)
        axes.set(xlabel="step", ylabel=TRACED[key], yscale="log")
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"{cell}, rate 3e-3")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
