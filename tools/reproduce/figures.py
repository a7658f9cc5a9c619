"""The pictures of the toy experiments: median over seeds as lines, least to most as bands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from tools.reproduce.experiments import REACHED, Result, Settings

DPI = 120
RISK = r"risk $\frac{1}{2}\|BA-D\|_F^2$ (loss on new samples)"
LEAST_SHOWN = 1e-16  # of a risk, where float64 ends


def draw(axes: Axes, curve: torch.Tensor, label: str, **style: Any) -> None:
    """A curve (steps + 1, seeds); what left float64's range is not drawn."""
    shown = torch.where(curve.isfinite(), curve, torch.nan)
    steps = range(len(shown))
    (line,) = axes.plot(steps, shown.nanmedian(1).values, label=label, **style)
    lowest, highest = (torch.nanquantile(shown, q, dim=1) for q in (0.0, 1.0))
    axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)


def alignment(result: Result, settings: Settings, expected: Mapping[str, str]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for i, variance in enumerate(settings.variances):
        draw(left, result.curves[f"{variance:g}"], f"{variance:g}", color=f"C{i}")
        values = result.rows[f"least sine, variance {variance:g}"]
        right.plot([variance] * len(values), values, ".", color=f"C{i}", markersize=9, alpha=0.6)
    left.legend(title="variance of A0's elements", fontsize=9, loc="lower right", ncols=len(settings.variances))
    left.set(
        xlabel="GD step",
        ylabel="sine of the largest angle between\nA's and the gradient's top spaces",
        ylim=(0, 1.05),
        title="the smaller A starts, the nearer it turns to the gradient",
    )
    given = [(v, expected.get(f"least sine, variance {v:g}")) for v in settings.variances]
    shown = [(v, float(e)) for v, e in given if e]
    if shown:
        right.plot(*zip(*shown, strict=True), "k_", markersize=18, label="expected")
    right.plot([], [], ".", color="grey", markersize=9, label="measured, a point a seed")
    outside = max(result.rows["share of B outside, largest"])
    right.text(0.97, 0.05, f"B: at most {outside:.0e} outside, at any step", ha="right", transform=right.transAxes)
    right.set(
        xscale="log",
        xlabel="variance of A0's elements",
        ylabel="least sine over the steps",
        ylim=(0, 1.05),
        title="the nearest that A comes to the gradient's space",
    )
    right.legend(fontsize=9)
    return figure


def initialisation(result: Result, settings: Settings, expected: Mapping[str, str]) -> plt.Figure:
    figure, (whole, near) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    styles = {
        "LoRA-One": {"color": "C0"},
        "LoRA-One, preconditioned": {"color": "C0", "linestyle": "--"},
        "LoRA": {"color": "C1"},
        "LoRA, preconditioned": {"color": "C1", "linestyle": "--"},
        "LoRA-GA, gamma 4": {"color": "C2"},
        "LoRA-GA, gamma 16": {"color": "C4"},
        "LoRA-SB": {"color": "C3"},
    }
    for name, style in styles.items():
        for axes in (whole, near):
            draw(axes, result.curves[name], name, **style)
        if f"floor of {name}" in result.rows:
            floor = float(torch.tensor(result.rows[f"floor of {name}"]).median())
            near.axhline(floor, color=style["color"], linestyle=":", linewidth=1.5)
    near.plot([], [], color="grey", linestyle=":", label="floors in closed form")
    whole.set(yscale="log", ylim=(LEAST_SHOWN, 3), xlabel="GD step", ylabel=RISK, title="LoRA-One goes on to zero")
    near.set(xlabel="GD step", ylabel=RISK, ylim=(0, 0.08), title="LoRA-GA and LoRA-SB stay just above their floors")
    figure.legend(*near.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4)
    return figure


def conditioning(result: Result, settings: Settings, expected: Mapping[str, str]) -> plt.Figure:
    figure, panels = _by_condition(result, settings.conditions)
    for axes in panels:
        axes.axhline(REACHED, color="grey", linestyle=":", linewidth=1.2)  # the level to which steps are counted
        axes.set(ylim=(LEAST_SHOWN, 3))
    panels[0].set_ylabel(RISK)
    figure.suptitle("an ill-conditioned shift slows plain GD, the preconditioned steps not at all")
    return figure


def relu(result: Result, settings: Settings, expected: Mapping[str, str]) -> plt.Figure:
    figure, panels = _by_condition(result, settings.relu_conditions)
    panels[0].set_ylabel(r"relative error $\|BA-D\|_F\,/\,\|D\|_F$")
    figure.suptitle("ReLU layer: the preconditioned rate is the same at every condition number, plain GD's is not")
    return figure


def _by_condition(result: Result, conditions: tuple[float, ...]) -> tuple[plt.Figure, list[Axes]]:
    """A panel for each condition number: both starts, with and without the preconditioner."""
    figure, grid = plt.subplots(
        1, len(conditions), figsize=(4.2 * len(conditions), 5.0), sharey=True, layout="constrained", squeeze=False
    )
    panels = list(grid[0])
    for axes, condition in zip(panels, conditions, strict=True):
        for start, color in (("LoRA-One", "C0"), ("LoRA", "C1")):
            for how, line in (("", "-"), (", preconditioned", "--")):
                curve = result.curves[f"{start}{how}, condition {condition:g}"]
                draw(axes, curve, f"{start}{how}", color=color, linestyle=line)
        axes.set(yscale="log", xlabel="GD step", title=f"condition number {condition:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4)
    return figure, panels


FIGURES: dict[str, Callable[[Result, Settings, Mapping[str, str]], plt.Figure]] = {
    "alignment": alignment,
    "initialisation": initialisation,
    "conditioning": conditioning,
    "relu": relu,
}


def save(name: str, result: Result, settings: Settings, expected: Mapping[str, str], folder: Path) -> Path:
    """Draw an experiment's picture into ``folder`` as ``<name>.png``."""
    figure = FIGURES[name](result, settings, expected)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
