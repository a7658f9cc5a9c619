"""What came of a sweep: rows, cells over seeds, the best of each group, tables and a plot.

In: the points of tools/sweep.py, or rows of the same keys.  Out: Markdown, a PNG, sweep.jsonl.  Pure but for what says
that it writes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_one_dist.commands import markdown

SEED = "train.seed"
HIGHER_IS_BETTER = ("exact_match", "matthews")


class Point(Protocol):
    """A run, as far as it is reported."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, Any]: ...
    def summary(self) -> dict[str, Any] | None: ...


def rows(points: Sequence[Point], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    """What is known of every point: labels, status (done, failed, missing), metrics before and after, seconds."""
    found = []
    for point in points:
        row: dict[str, Any] = {"name": point.name, "labels": dict(point.labels)}
        summary = point.summary()
        if summary is not None:
            seconds = sum(phase["seconds"] for phase in summary["phases"])
            row |= {"status": "done", "before": summary["before"], **summary["after"], "seconds": round(seconds, 1)}
        elif point.name in failed:
            row |= {"status": "failed", "log": failed[point.name]}
        else:
            row |= {"status": "missing"}
        found.append(row)
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the sample's standard deviation if there are two values or more."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Cell:
    """The runs that differ in the seed only."""

    group: tuple[tuple[str, Any], ...]
    """The labels but seed and x."""
    x: Any
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def cells(found: Sequence[Mapping[str, Any]], metric: str, x: str) -> list[Cell]:
    """Runs that are done, by group and x, in the order in which they come."""
    collected: dict[tuple[tuple[tuple[str, Any], ...], Any], list[float]] = {}
    for row in found:
        if row["status"] == "done" and metric in row:
            labels = {key: _hashable(value) for key, value in row["labels"].items()}
            group = tuple((key, value) for key, value in labels.items() if key not in (x, SEED))
            collected.setdefault((group, labels.get(x)), []).append(row[metric])
    return [Cell(group, at, tuple(values)) for (group, at), values in collected.items()]


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def best(of: Sequence[Cell], metric: str) -> list[Cell]:
    """The best x of every group, by the mean over its seeds."""
    choose = max if metric in HIGHER_IS_BETTER else min
    groups = dict.fromkeys(cell.group for cell in of)
    return [choose((cell for cell in of if cell.group == group), key=lambda cell: cell.mean) for group in groups]


def tables(found: Sequence[Mapping[str, Any]], metric: str, x: str) -> str:
    """Every run, and the best x of every group with mean and spread over its seeds."""
    measures = list(dict.fromkeys(key for row in found for key in ("eval_loss", *HIGHER_IS_BETTER) if key in row))
    every = [
        {**row["labels"], **{key: row.get(key) for key in measures}, "seconds": row.get("seconds"), "": row["status"]}
        for row in found
    ]
    chosen = best(cells(found, metric, x), metric)
    summed = [
        {
            **dict(cell.group),
            f"best {x}": cell.x,
            metric: cell.mean,
            "spread": mean_and_spread(cell.values)[1],
            "runs": len(cell.values),
        }
        for cell in chosen
    ]
    failures = [f"{row['name']} failed:\n\n```\n{row['log']}\n```" for row in found if row["status"] == "failed"]
    return "\n\n".join([markdown.table(every), *([markdown.table(summed)] if summed else []), *failures])


def plot(found: Sequence[Mapping[str, Any]], metric: str, x: str, path: Path, dpi: int = 100) -> bool:
    """The metric over x, a line for each group, with a band from the least to the largest of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    of = [cell for cell in cells(found, metric, x) if isinstance(cell.x, int | float)]
    if not of:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = pyplot.get_cmap("tab20")
    for i, group in enumerate(dict.fromkeys(cell.group for cell in of)):
        line = sorted((cell for cell in of if cell.group == group), key=lambda cell: cell.x)
        at = [cell.x for cell in line]
        label = ", ".join(str(value) for _, value in group) or None
        drawn = axes.plot(at, [cell.mean for cell in line], marker="o", label=label, color=colors(i % colors.N))[0]
        least, most = [min(cell.values) for cell in line], [max(cell.values) for cell in line]
        axes.fill_between(at, least, most, color=drawn.get_color(), alpha=0.2)
    if min(cell.x for cell in of) > 0:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=metric)
    if any(cell.group for cell in of):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)
    return True


def write(points: Sequence[Point], failed: Mapping[str, str], out: Path, metric: str, x: str) -> str:
    """sweep.jsonl, sweep.md and sweep.png.  Returns the tables."""
    found = rows(points, failed)
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "sweep.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    text = tables(found, metric, x)
    _replace(out / "sweep.md", text + "\n")
    plot(found, metric, x, out / "sweep.png")
    return text


def _replace(path: Path, text: str) -> None:
    """A file that is whole at any time."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
