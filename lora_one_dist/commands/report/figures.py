"""The figures of tools/report.py: each a PNG that is readable on a phone.

In: runs as :mod:`runs` reads them.  Out: a :class:`Figure` each; nothing is drawn of what no run has.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lora_one_dist.commands.report.runs import SCORES, Best, Run, is_number

WIDTH_INCHES, HEIGHT_INCHES, DPI = 5.6, 3.6, 160  # 900 pixels: sharp on a phone, letters of 9 pixels there
LINE_INCHES = 0.19  # a line of a legend, a bar with its gap
MOST_NAMED = 10  # runs with a colour and a line in the legend each; of more, a colour for each method
MOST_BARS = 4  # runs drawn as bars of a phase; more are dots
LONGEST_LABEL = 44
SMOOTHED_PART = 25  # training losses are averaged over 1/25 of the logged steps
LOG_FROM = 10.0  # largest over smallest loss or norm from which its axis is logarithmic
SHORTEST_SECONDS = 1e-3  # a phase below had nothing to do
ERROR = "certified error"
FEW_POINTS = 60  # up to so many are marked one by one
GIB, MIB = 2**30, 2**20


@dataclass
class Figure:
    """A picture, and what is said with it."""

    name: str
    title: str
    caption: str
    png: bytes


class Style:
    """A colour and a name in the legend for each run."""

    def __init__(self, runs: Sequence[Run]):
        self.by_method = len(runs) > MOST_NAMED
        names = list(dict.fromkeys(self._name(run) for run in runs))
        palette = plt.get_cmap("tab10" if len(names) <= MOST_NAMED else "turbo")
        spread = np.linspace(0.05, 0.95, len(names))
        self.colours = {name: palette(i if len(names) <= MOST_NAMED else spread[i]) for i, name in enumerate(names)}

    def _name(self, run: Run) -> str:
        return run.method if self.by_method else run.label

    def colour(self, run: Run) -> Any:
        return self.colours[self._name(run)]

    def legend(self, canvas: Canvas, runs: Sequence[Run], more: Mapping[str, Any] | None = None) -> None:
        """Below the axes, for these runs and other handles by label."""
        handles = {self._name(run): plt.Line2D([], [], color=self.colour(run), linewidth=2.5) for run in runs}
        if len(handles) == 1:
            handles = {}
        handles |= more or {}
        if not handles:
            return
        labels = [literal(name) for name in handles]
        columns = 1 if max(map(len, labels)) > LONGEST_LABEL / 2 else 2
        canvas.set_figheight(canvas.get_figheight() + LINE_INCHES * -(-len(labels) // columns))
        canvas.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns, frameon=False)


def literal(text: str) -> str:
    """Text for matplotlib, which would typeset what stands between dollars; cut in its middle if it is long."""
    half = LONGEST_LABEL // 2
    text = text if len(text) <= LONGEST_LABEL else f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")


def _canvas(height: float = HEIGHT_INCHES, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Canvas, Any]:
    canvas, axes = plt.subplots(rows, columns, figsize=(WIDTH_INCHES, height), layout="constrained", **more)
    for each in np.ravel(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return canvas, axes


def _finish(canvas: Canvas, name: str, title: str, caption: str) -> Figure:
    buffer = io.BytesIO()
    canvas.savefig(buffer, dpi=DPI, metadata={"Software": None})
    plt.close(canvas)
    return Figure(name, title, caption, buffer.getvalue())


def _by_step(axes: Axes, label: str) -> None:
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _write_out(axis: Axis) -> None:
    """A logarithmic axis with its numbers written out, between powers of ten at 2 and 5."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _marker(values: Sequence[Any]) -> str | None:
    return "." if len(values) <= FEW_POINTS else None


# Training -------------------------------------------------------------------------------------------------------------


def training(runs: Sequence[Run], style: Style) -> list[Figure]:
    """Losses, learning rate, gradient norm and throughput by step."""
    curves = [
        _curve(runs, style, "lr", "Learning rate", "learning rate", "As set for each logged step."),
        _curve(runs, style, "grad_norm", "Gradient norm", "norm", "Before clipping and preconditioner.", "log"),
        _curve(runs, style, "tokens_per_second", "Throughput", "tokens/s", "All ranks together, padding left out."),
    ]
    return [figure for figure in (_losses(runs, style), *curves) if figure is not None]


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred mean over 1/SMOOTHED_PART of the values, fewer towards the ends."""
    reach = len(values) // SMOOTHED_PART // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _losses(runs: Sequence[Run], style: Style) -> Figure | None:
    drawn = [run for run in runs if run.series("loss")[0] or run.series("eval_loss")[0]]
    if not drawn:
        return None
    canvas, axes = _canvas()
    seen: list[float] = []
    for run in drawn:
        (steps, values), (held_steps, held) = run.series("loss"), run.series("eval_loss")
        axes.plot(steps, values, color=style.colour(run), alpha=0.3, linewidth=0.9)
        axes.plot(steps, smooth(values), color=style.colour(run), linewidth=1.6, marker=_marker(values))
        axes.plot(held_steps, held, color=style.colour(run), linestyle=":", marker="o", markerfacecolor="white")
        seen += [*values, *held]
    _by_step(axes, "loss")
    if min(seen) > 0 and max(seen) > LOG_FROM * min(seen):
        axes.set_yscale("log")
        _write_out(axes.yaxis)
    handles = {"training": plt.Line2D([], [], color="grey", linewidth=1.6)}
    if any(run.series("eval_loss")[0] for run in drawn):
        handles["held out"] = plt.Line2D([], [], color="grey", linestyle=":", marker="o", markerfacecolor="white")
    style.legend(canvas, drawn, handles)
    caption = "Line: training, a mean over neighbouring logged steps; faint: as logged. Circles: held-out data."
    return _finish(canvas, "loss", "Loss", caption)


def _curve(
    runs: Sequence[Run], style: Style, key: str, title: str, label: str, caption: str, scale: str = "linear"
) -> Figure | None:
    drawn = [run for run in runs if run.series(key)[0]]
    if not drawn:
        return None
    canvas, axes = _canvas()
    values_of_all = [value for run in drawn for value in run.series(key)[1]]
    lowest, highest = min(values_of_all), max(values_of_all)
    for run in drawn:
        steps, values = run.series(key)
        axes.plot(steps, values, color=style.colour(run), linewidth=1.2, marker=_marker(values))
    _by_step(axes, label)
    if scale == "log" and lowest > 0 and highest > LOG_FROM * lowest:
        axes.set_yscale("log")
        _write_out(axes.yaxis)
    else:
        axes.set_ylim(min(0.0, lowest), 1.05 * highest or None)
    style.legend(canvas, drawn)
    return _finish(canvas, key, title, caption)


# Phases ---------------------------------------------------------------------------------------------------------------


def phases(runs: Sequence[Run], style: Style) -> list[Figure]:
    """Seconds and peak memory of each phase."""
    drawn = [run for run in runs if any(row["seconds"] >= SHORTEST_SECONDS for row in run.phases.values())]
    if not drawn:
        return []
    largest = max(row["peak_bytes"] for run in drawn for row in run.phases.values())
    unit, scale = ("GiB", GIB) if largest >= 2 * GIB else ("MiB", MIB)
    memory = _by_phase(drawn, style, lambda row: row["peak_bytes"] / scale, f"peak {unit} of the fullest rank", False)
    seconds = _by_phase(drawn, style, lambda row: row["seconds"], "seconds of the slowest rank", True)
    return [
        _finish(seconds, "seconds", "Seconds by phase", "Of a run that went on, those of its last start."),
        _finish(
            memory,
            "memory",
            "Peak memory by phase",
            "GPU allocations; on a CPU the memory of the process, imports included.",
        ),
    ]


def _by_phase(
    runs: Sequence[Run], style: Style, value: Callable[[Mapping[str, Any]], float], label: str, spread: bool
) -> Canvas:
    """Bars with their numbers for few runs, dots for many; ``spread`` values' dots on a logarithmic axis."""
    long = {
        run.label: {name: row for name, row in run.phases.items() if row["seconds"] >= SHORTEST_SECONDS} for run in runs
    }
    names = list(dict.fromkeys(name for rows in long.values() for name in rows))
    bars = len(runs) <= MOST_BARS
    lines = len(names) * (len(runs) if bars else 2) + len(names)
    canvas, axes = _canvas(height=1.0 + LINE_INCHES * lines)
    thickness = 0.8 / len(runs)
    for i, run in enumerate(runs):
        at = [names.index(name) + ((i + 0.5) * thickness - 0.4 if bars else 0.0) for name in long[run.label]]
        values = [value(row) for row in long[run.label].values()]
        if bars:
            drawn = axes.barh(at, values, thickness * 0.9, color=style.colour(run))
            axes.bar_label(drawn, [_short(x) for x in values], padding=3, fontsize=8)
        else:
            axes.plot(values, at, "o", color=style.colour(run), alpha=0.6, markersize=5)
    axes.set_yticks(range(len(names)), [literal(name) for name in names])
    axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.12 * max(value(row) for rows in long.values() for row in rows.values()))
    if spread and not bars:
        axes.set_xscale("log")
        _write_out(axes.xaxis)
        axes.autoscale(axis="x")
    style.legend(canvas, runs)
    return canvas


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


# Methods --------------------------------------------------------------------------------------------------------------


def methods(best: Sequence[Best]) -> Figure | None:
    """Held-out loss and scores of the best setting of each method, a dot for each run."""
    if not best:
        return None
    keys = {"eval_loss": "held-out loss (lower is better)"}
    keys |= {key: f"{name} (higher is better)" for key, name in SCORES.items()}
    keys = {key: label for key, label in keys.items() if any(each.values(key) for each in best)}
    height = len(keys) * (0.9 + 1.8 * LINE_INCHES * len(best))
    canvas, axes = _canvas(height, len(keys), squeeze=False)
    for each, (key, label) in zip(np.ravel(axes), keys.items(), strict=True):
        for place, candidate in enumerate(best):
            values = candidate.values(key)
            each.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            if values:
                each.plot(statistics.mean(values), place, "|", color="black", markersize=16, markeredgewidth=2)
        each.set_yticks(range(len(best)), [literal(candidate.method) for candidate in best])
        each.set(xlabel=label, ylim=(len(best) - 0.5, -0.5))
        each.margins(x=0.1)
    return _finish(canvas, "methods", "Best of each method", "Dot: a run, one for each seed. Bar: their mean.")


# Initialisation -------------------------------------------------------------------------------------------------------


def initialisation(run: Run, name: str) -> list[Figure]:
    """Coverage by layer and rank, and along the depth; nothing of a method without an SVD."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in run.covered_layers:
        kinds.setdefault(row["name"].rpartition(".")[2], []).append(row)
    return [_heat_map(run, kinds, f"{name}-map"), _depth(run, kinds, f"{name}-depth")] if kinds else []


def depth_of(name: str, order: int) -> int:
    """Number of the block that a layer is in: the first one in its name, else its place among its kind."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else order


def _heat_map(run: Run, kinds: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Figure:
    """A map for each kind of layer: blocks down, ranks across."""
    ranks = sorted({rank for rows in kinds.values() for row in rows for rank in row["coverage"]})
    deepest = max(len(rows) for rows in kinds.values())
    lines = -(-len(kinds) // 2)
    canvas, axes = plt.subplots(
        lines,
        2,
        figsize=(WIDTH_INCHES, lines * (0.75 + min(2.2, max(0.8, 0.09 * deepest)))),
        layout="constrained",
        squeeze=False,
    )
    for spare in np.ravel(axes)[len(kinds) :]:
        spare.set_visible(False)
    for each, (kind, rows) in zip(np.ravel(axes), kinds.items(), strict=False):
        shares = np.array([[row["coverage"].get(rank, np.nan) for rank in ranks] for row in rows])
        drawn = each.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        each.set_facecolor("lightgrey")
        each.set_title(literal(kind), fontsize=10)
        each.set_xticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=8)
        _mark_rank(each, ranks, run.r, len(rows))
        shown = sorted({round(x) for x in np.linspace(0, len(rows) - 1, min(len(rows), 6))})
        each.set_yticks(shown, [str(depth_of(rows[i]["name"], i)) for i in shown], fontsize=8)
    canvas.supxlabel("rank", fontsize=10)
    canvas.supylabel("block", fontsize=10)
    canvas.colorbar(
        drawn, ax=axes, label=f"share of the {_matrix(run)}'s energy", location="top", fraction=0.03, aspect=40
    )
    caption = f"{run.label}. Framed: lora.r = {run.r}. Grey: not measured."
    return _finish(canvas, name, "Coverage by block and rank", caption)


def _mark_rank(axes: Axes, ranks: Sequence[int], r: int | None, rows: int) -> None:
    if r in ranks:
        at = ranks.index(r)
        frame = Rectangle((at - 0.5, -0.5), 1, rows, fill=False, edgecolor="red", linewidth=1.8, clip_on=False)
        axes.add_patch(frame)
        axes.get_xticklabels()[at].set(fontweight="bold", color="red")


def _matrix(run: Run) -> str:
    return "weight" if run.method == "pissa" else "gradient"


def _depth(run: Run, kinds: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Figure:
    """Coverage at r, certified error and, if it was measured, the agreement of the halves by block."""
    panels: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        f"share covered at {run.r}": lambda row: row["coverage"].get(run.r),
        ERROR: lambda row: row["certified_error"],
    }
    if any(row["half_overlap"] is not None for rows in kinds.values() for row in rows):
        panels["overlap of halves"] = lambda row: row["half_overlap"]
    canvas, axes = _canvas(2.1 * len(panels), len(panels), sharex=True)
    for each, (label, value) in zip(axes, panels.items(), strict=True):
        for kind, rows in kinds.items():
            points = [(depth_of(row["name"], i), value(row)) for i, row in enumerate(rows)]
            points = [(depth, y) for depth, y in points if is_number(y) and (y > 0 or label != ERROR)]
            each.plot([depth for depth, _ in points], [y for _, y in points], marker=".", label=literal(kind))
        each.set_ylabel(label)
        if label == ERROR:
            each.set_yscale("log")
        else:
            each.set_ylim(0, 1.03)
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    tolerance = run.config.get("init.svd_tolerance")
    if tolerance:
        axes[1].axhline(tolerance, color="grey", linestyle=":")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.set_figheight(canvas.get_figheight() + LINE_INCHES * -(-len(labels) // 3))
    canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    caption = f"{run.label}. Dotted: init.svd_tolerance; errors above are the least that fp32 shows."
    return _finish(canvas, name, "Along the depth", caption)
