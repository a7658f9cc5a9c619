"""What the study has found: tables, verdicts and curves, from its run folders.

In: a :class:`study.Study`, done or not, and what base.json says.  Out: study.json, tables.md and PNGs in one folder.
What is missing is named.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_one_dist.commands import markdown, sweep, sweep_report
from tools.study import tasks

if TYPE_CHECKING:
    from tools.study.study import Study

COVERAGE_SHOWN = ("8", "32", "128")
EARLY = 4  # the first of so many parts of a run
SMOOTHED = 10  # steps whose mean a curve shows
MEASURES = {"eval_loss": "loss", "exact_match": "exact match"}
DPI = 80


def write(study: Study, facts: Mapping[str, Any], results: Path) -> None:
    """All files of the report."""
    results.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"base": dict(facts), "environment": environment(study), "tasks": {}, "coverage": {}}
    parts = [head(found)]
    for task in tasks.TASKS:
        swept, final = swept_rows(study, task), final_rows(study, task)
        missing = missing_runs(study, task)
        found["tasks"][task] = {"sweep": swept, "final": final, "missing": missing}
        if not final:
            parts.append(f"## Task {task}\n\nNo run is done.")
            continue
        found["tasks"][task]["verdicts"] = {measure: verdicts(final, "LoRA-One", measure) for measure in MEASURES}
        parts.append(task_text(study, task, found["tasks"][task]))
        plot_rates(study, task, results / f"rates-{task}.png")
        plot_curves(study, task, results / f"curves-{task}.png")
    found["coverage"] = {task: coverage(study, task) for task in tasks.TASKS}
    parts.append(coverage_text(found["coverage"]))
    (results / "study.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (results / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def environment(study: Study) -> dict[str, Any]:
    """Commit and versions of the first run that is there, and the hardware."""
    known: dict[str, Any] = {"hardware": f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}"}
    for path in sorted((study.out / "runs").glob("*/*/run.json"))[:1]:
        run = json.loads(path.read_text(encoding="utf-8"))
        known |= {key: run[key] for key in ("commit", "python", "versions")}
    return known


def all_points(study: Study, task: str) -> list[Any]:
    return [*study.sweep_points(task), *study.edge_points(task), *study.seed_points(task)]


def missing_runs(study: Study, task: str) -> list[str]:
    """Runs that have no result, as text."""
    rows = sweep_report.rows(all_points(study, task), study.failed)
    shown = [{"status": row["status"], **row["labels"]} for row in rows if row["status"] != "done"]
    return [f"{row['method']}, lr {row['optim.lr']:g}, seed {row['train.seed']}: {row['status']}" for row in shown]


def swept_rows(study: Study, task: str) -> list[dict[str, Any]]:
    """Loss and exact match of every rate at the first seed."""
    points = [*study.sweep_points(task), *study.edge_points(task)]
    rows = [row for row in sweep_report.rows(points, study.failed) if row["status"] == "done"]
    kept = ("eval_loss", "exact_match", "seconds")
    return [{**row["labels"], **{key: row[key] for key in kept}, "before": row["before"]} for row in rows]


def final_rows(study: Study, task: str) -> list[dict[str, Any]]:
    """A row for each method: its best rate, mean and spread over the seeds."""
    rows = sweep_report.rows(all_points(study, task), study.failed)
    rates = {
        method: sorted(
            {
                row["labels"]["optim.lr"]
                for row in rows
                if row["labels"]["method"] == method and row["labels"]["train.seed"] == 0 and row["status"] == "done"
            }
        )
        for method in study.methods
    }
    cells = {measure: sweep_report.cells(rows, measure, "optim.lr") for measure in MEASURES}
    best = study.best(task, [*study.sweep_points(task), *study.edge_points(task)])
    found = []
    for method, rate in best.items():
        row: dict[str, Any] = {"method": method, "lr": rate, "at_edge": rate in (rates[method][0], rates[method][-1])}
        for measure in MEASURES:
            values = next(c.values for c in cells[measure] if dict(c.group)["method"] == method and c.x == rate)
            mean, spread = sweep_report.mean_and_spread(values)
            row |= {measure: mean, f"{measure}_spread": spread, "seeds": len(values), f"{measure}_values": values}
        points = [study.point(task, method, rate, seed) for seed in range(study.budget.seeds)]
        curves = [training_losses(point) for point in points if point.summary() is not None]
        row["early_loss"] = fmean(fmean(losses[: max(1, len(losses) // EARLY)]) for losses in curves)
        found.append(row)
    return found


def training_losses(point: sweep.Point) -> list[float]:
    """Of each step of a run, as they are: a report leaves out what is damaged or not finite, a mean must not."""
    lines = (point.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [values["loss"] for values in map(json.loads, lines) if "loss" in values]


def verdicts(final: Sequence[Mapping[str, Any]], of: str, measure: str) -> list[dict[str, Any]]:
    """For each other method: does ``of`` win, tie or lose?

    A tie: the means differ by less than twice the standard error of their difference, from the spreads over seeds.
    """
    own = next((row for row in final if row["method"] == of), None)
    sign = 1 if measure in sweep_report.HIGHER_IS_BETTER else -1
    found = []
    for row in final:
        if own is None or row is own:
            continue
        gap = sign * (own[measure] - row[measure])
        pair = [(r[f"{measure}_spread"], r["seeds"]) for r in (own, row)]
        error, verdict = None, "not decided: one seed"
        if all(spread is not None for spread, _ in pair):
            error = math.sqrt(sum(spread**2 / seeds for spread, seeds in pair))
            verdict = "tie" if abs(gap) <= 2 * error else "wins" if gap > 0 else "loses"
        found.append(
            {"of": of, "against": row["method"], "better by": gap, "standard error": error, "verdict": verdict}
        )
    return found


# Text -----------------------------------------------------------------------------------------------------------------


def head(found: Mapping[str, Any]) -> str:
    """What was measured, on what, with what."""
    base, known = found["base"], found["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in base["packages"].items())
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    return (
        "# Tables of the study\n\n"
        "Written by tools/study/report.py from the run folders; what they say is in README.md.\n\n"
        f"- hardware: {known['hardware']}; commit {known.get('commit')}; python {known.get('python')}, {versions}\n"
        f"- base: {base['parameters']} parameters, {base['steps']} steps of {base['tokens'] // base['steps']} tokens, "
        f"{base['seconds']} s on {base['threads']} threads, held-out loss {base['held_out_loss']:.3f} nats a token\n"
        f"- text: {base['characters']} characters of prose of {packages}"
    )


def task_text(study: Study, task: str, found: Mapping[str, Any]) -> str:
    """The tables of one task."""
    before = found["sweep"][0]["before"]
    final = [
        {
            "method": row["method"],
            "best lr": f"{row['lr']:g}" + (" (edge)" if row["at_edge"] else ""),
            "loss": f"{row['eval_loss']:.4f}",
            "loss ±": _spread(row["eval_loss_spread"], 4),
            "exact match": f"{row['exact_match']:.3f}",
            "exact match ±": _spread(row["exact_match_spread"], 3),
            "early loss": f"{row['early_loss']:.3f}",
            "seeds": row["seeds"],
        }
        for row in found["final"]
    ]
    rates = sorted({row["optim.lr"] for row in found["sweep"]})
    swept = []
    for method in dict.fromkeys(row["method"] for row in found["sweep"]):
        own = {row["optim.lr"]: row["eval_loss"] for row in found["sweep"] if row["method"] == method}
        swept.append({"method": method, **{f"{rate:g}": f"{own[rate]:.3f}" if rate in own else "" for rate in rates}})
    parts = [
        f"## Task {task}",
        f"Before: loss {before['eval_loss']:.4f}, exact match {before['exact_match']:.3f}. Mean and standard deviation "
        "over seeds at each method's best rate (chosen by held-out loss at seed 0). Early loss: mean training loss of "
        f"the first 1/{EARLY} of the steps.",
        markdown.table(final),
        "Held-out loss by learning rate, seed 0:",
        markdown.table(swept),
    ]
    for measure, rows in found["verdicts"].items():
        shown = [
            {
                f"{row['of']} against": row["against"],
                "better by": f"{row['better by']:+.4f}",
                "standard error": _spread(row["standard error"], 4),
                "": row["verdict"],
            }
            for row in rows
        ]
        parts += [f"Wins and losses in held-out {MEASURES[measure]}:", markdown.table(shown)] if shown else []
    if found["missing"]:
        parts.append("Missing runs:\n\n" + "\n".join(f"- {line}" for line in found["missing"]))
    return "\n\n".join(parts)


def _spread(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def coverage(study: Study, task: str) -> list[dict[str, Any]]:
    """Share of the gradient's energy at some ranks: mean and least over the layers of a kind and over all layers."""
    found = []
    for point in study.coverage_points(task):
        path = point.folder / "init_report.json"
        if point.summary() is None:
            continue
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        kinds = dict.fromkeys(layer["name"].rsplit(".", 1)[-1] for layer in layers)
        for kind in (*kinds, "all layers"):
            own = [layer for layer in layers if kind == "all layers" or layer["name"].endswith(kind)]
            row: dict[str, Any] = {"layers": kind, "m x n": f"{own[0]['m']} x {own[0]['n']}" if kind in kinds else ""}
            row |= {"samples": point.config.init.num_samples, "loss on": point.config.data.loss_on}
            for rank in COVERAGE_SHOWN:
                shares = [layer["coverage"][rank] for layer in own]
                row |= {f"r {rank}": fmean(shares), f"r {rank}, least": min(shares)}
            found.append(row)
    return found


def coverage_text(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The coverage tables of all tasks."""
    parts = ["## Coverage: share of the gradient's squared Frobenius norm in the top r singular directions"]
    for task, rows in found.items():
        if rows:
            shown = [{key: f"{v:.3f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
            parts += [f"Task {task}, mean and least over the layers of a kind:", markdown.table(shown)]
        else:
            parts.append(f"Task {task}: missing.")
    return "\n\n".join(parts)


# Curves ---------------------------------------------------------------------------------------------------------------


def plot_rates(study: Study, task: str, path: Path) -> None:
    """Held-out loss over the learning rate, a line for each method."""
    sweep_report.plot(sweep_report.rows(all_points(study, task), {}), "eval_loss", "optim.lr", path, dpi=DPI)


def plot_curves(study: Study, task: str, path: Path) -> None:
    """Training loss of each method at its best rate and the first seed, the mean of SMOOTHED steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = pyplot.get_cmap("tab20")
    points = [*study.sweep_points(task), *study.edge_points(task)]
    for i, (method, rate) in enumerate(study.best(task, points).items()):
        point = study.point(task, method, rate, 0)
        losses = training_losses(point)
        means = [fmean(losses[max(0, k + 1 - SMOOTHED) : k + 1]) for k in range(len(losses))]
        axes.plot(range(1, len(means) + 1), means, label=f"{method}, {rate:g}", color=colors(i), linewidth=1.2)
    axes.set(xlabel="step", ylabel=f"training loss (mean of {SMOOTHED} steps)", title=f"task {task}")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
