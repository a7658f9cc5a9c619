"""The report's rows as means, Markdown and a picture.  Pure but for the picture's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_one_dist.commands.markdown import table

ENOUGH = 0.9  # of the energy, or of an overlap, in the two lines on top
MEASURES = {"sign": "same sign", "magnitude": "within a factor of 10", "overlap": "overlap of top spaces"}
Row = Mapping[str, Any]


def coverage_means(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Share of energy by rank for each kind of layer and for ``all``: means over layers, each of which counts alike."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["name"].rpartition(".")[2], []).append(row)
    kinds["all"] = list(rows)
    ranks = rows[0]["coverage"]
    return {
        kind: {rank: sum(row["coverage"][rank] for row in of) / len(of) for rank in ranks} for kind, of in kinds.items()
    }


def similarity_means(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """By count of samples: sign and magnitude of all elements together, overlap as a mean over layers."""
    sizes = [row["m"] * row["n"] for row in rows]
    weights = {"sign": sizes, "magnitude": sizes, "overlap": [1] * len(rows)}
    return {
        count: {
            key: sum(w * row["similarity"][count][key] for w, row in zip(of, rows, strict=True)) / sum(of)
            for key, of in weights.items()
        }
        for count in rows[0]["similarity"]
    }


def answers(rows: Sequence[Row], many: int, r: int) -> list[str]:
    """Which rank, and how many samples: a line each."""
    overlaps = {count: of["overlap"] for count, of in similarity_means(rows).items()}
    rank, count = _first_enough(coverage_means(rows)["all"]), _first_enough(overlaps)
    return [
        f"Least rank of these that covers {ENOUGH:.0%} of the gradient's energy, mean over layers: {rank}",
        f"Fewest samples of these whose top spaces (lora.r = {r}) overlap those of {many} by {ENOUGH:.0%}: {count}",
    ]


def _first_enough(shares: Mapping[int, float]) -> str:
    return next((str(key) for key, share in shares.items() if share >= ENOUGH), "none")


def markdown(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole report.  ``about``: model, data, many, r, target_tokens by count of samples, and the run."""
    many, r, run = about["many"], about["r"], about["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    least, fewest = answers(rows, many, r)
    return f"""# How many samples, which rank

- {least}
- {fewest}

{about["model"]}, {about["data"]}: the gradient of the first {many} samples in the order of the run,
{about["target_tokens"][many]} target tokens that count alike.
Commit {run["commit"]}, {run["world_size"]} ranks, {run["device"]}, {versions}.

## Share of the energy of the gradient of {many} samples that a rank covers

Means over layers, each of which counts alike.

{table(_coverage_rows(rows))}

## The gradient of fewer samples beside that of {many}, of which they are a part

Same sign, and magnitudes within a factor of 10 of each other (as in arXiv 2407.05000): shares of all elements, so that
a layer counts by its size. Overlap of top spaces: mean squared cosine between those of the top lora.r = {r} singular
vectors, left and right, a mean over layers, each of which counts alike. A gradient of fewer target tokens than lora.r
has fewer directions, and the others of its space are arbitrary.

{table(_similarity_rows(rows, about["target_tokens"]))}

By layer: same sign / within a factor of 10 / overlap, for each count of samples.

{table(_layer_rows(rows))}
"""


def _coverage_rows(rows: Sequence[Row]) -> list[Row]:
    means = coverage_means(rows)
    return [{"layers": kind, **{f"r {rank}": share for rank, share in of.items()}} for kind, of in means.items()]


def _similarity_rows(rows: Sequence[Row], tokens: Mapping[int, int]) -> list[Row]:
    return [
        {"samples": count, "target tokens": tokens[count], **{MEASURES[key]: value for key, value in of.items()}}
        for count, of in similarity_means(rows).items()
    ]


def _layer_rows(rows: Sequence[Row]) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        cells = {str(k): " / ".join(f"{of[key]:.3f}" for key in MEASURES) for k, of in row["similarity"].items()}
        found.append({"layer": row["name"], "m x n": f"{row['m']} x {row['n']}", **cells})
    return found


def plot(rows: Sequence[Row], many: int, r: int, path: Path) -> None:
    """One picture: energy covered by rank, and similarity by samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_rank, by_samples) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for kind, covered in coverage_means(rows).items():
        style = {"color": "black", "linewidth": 2} if kind == "all" else {}
        by_rank.plot([*covered], [*covered.values()], marker="o", markersize=3, label=kind, **style)
    by_rank.axvline(r, color="grey", linestyle=":", label=f"lora.r = {r}")
    by_rank.set(xlabel="rank", ylabel="share of energy covered", ylim=(0, 1.02))
    by_rank.set_title(f"gradient of {many} samples, mean over layers")
    alike = similarity_means(rows)
    for key, label in MEASURES.items():
        by_samples.plot([*alike], [of[key] for of in alike.values()], marker="o", markersize=3, label=label)
    by_samples.set(xlabel="samples", ylabel=f"likeness to the gradient of {many}", ylim=(0, 1.02), title="all layers")
    for axes in (by_rank, by_samples):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
