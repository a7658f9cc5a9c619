"""The gradient of few samples beside that of many, layer by layer on their owners.

In: a frozen base, samples in the order in which a run's init batch takes them.  Out: a report row per layer, on every
rank.  For each layer group two passes, after which nothing of it is left but its rows:

1. many    every layer's G of all samples is summed on its owner, which keeps G and takes its SVD
2. few     the sum begins anew; at each count of samples the owners compare what they have with G

Every G is a mean over target tokens, as in training.  Peak bytes per rank: those of the gradient phase with
``init.halves`` (two gradients on the owner; :mod:`lora_one_dist.plan.memory`), one SVD, and the top spaces of the owned
layers, ``4 sum(r (m + n))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_one_dist.base.sharding import Base
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.config.seeds import seed_of
from lora_one_dist.config.settings import Config
from lora_one_dist.initialise import spectral
from lora_one_dist.initialise.gradient import MicroBatch, deal_between, full_gradient, num_targets
from lora_one_dist.initialise.pairs import COVERAGE_RANKS, LayerGroup, Progress, layer_groups, refuse_unusable
from lora_one_dist.initialise.similarity import similarity

# An SVD's first certified iterations: shares of energy and overlaps are right to two digits with them.
ANY_ERROR = float("inf")
Row = dict[str, Any]


def measure(
    base: Base,
    targets: Sequence[Target],
    config: Config,
    samples: Sequence[dict[str, Any]],
    counts: Sequence[int],
    pad_token_id: int,
    progress: Progress,
) -> list[Row]:
    """Coverage and similarity of every target.  Collective.

    Args:
        samples: the many.  counts: rising, none above them: of the first so many samples.

    Raises:
        GradientError, RankError: if a gradient of the many is zero or not finite, on every rank.
    """
    how = (config.init_micro_batch_size, "token", pad_token_id)
    (whole,) = deal_between(samples, [0, len(samples)], *how)
    parts = deal_between(samples, [0, *counts], *how)
    tokens = [num_targets(sample) for sample in samples]
    steps = [(count, part, sum(tokens) / sum(tokens[:count])) for count, part in zip(counts, parts, strict=True)]
    rows: list[Row] = []
    for group in layer_groups(targets, config.init.layer_groups):
        rows += _measure_group(base, group, config, whole, steps, progress)
    order = {target.name: i for i, target in enumerate(targets)}
    found = [row for own in comm.all_gather_object(rows) for row in own]
    return sorted(found, key=lambda row: order[row["name"]])


def _measure_group(
    base: Base,
    group: LayerGroup,
    config: Config,
    whole: Sequence[MicroBatch],
    steps: Sequence[tuple[int, Sequence[MicroBatch], float]],
    progress: Progress,
) -> list[Row]:
    """Rows of the layers that this rank owns.  ``steps``: count, what it adds, and all tokens over its.  Collective."""
    total = len(whole) + sum(len(part) for _, part, _ in steps)
    tick = _counter(progress, f"{group.label}gradients, micro-batches of this rank", total)
    passes = (base, group.layers, group.owners)
    many, _ = full_gradient(*passes, whole, config.init.buffer, tick)
    rows: dict[str, Row] = {}
    spaces: dict[str, spectral.TruncatedSVD] = {}
    with comm.all_or_none("decomposing the gradient of many samples"):
        for layer in group.owned_here:
            rows[layer.name], spaces[layer.name] = _decomposed(layer, many[layer.name], config)
    few: dict[str, torch.Tensor] = {}
    for count, part, scale in steps:
        full_gradient(*passes, part, config.init.buffer, tick, onto=few)
        with comm.all_or_none(f"comparing the gradient of {count} samples"):
            for layer in group.owned_here:
                pair = few[layer.name], many[layer.name]
                rows[layer.name]["similarity"][count] = _compared(layer, *pair, scale, spaces[layer.name], config)
    return list(rows.values())


def _counter(progress: Progress, label: str, total: int) -> Callable[[], None]:
    """To be called after each of ``total`` units."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    return tick


def _decomposed(layer: Target, G: torch.Tensor, config: Config) -> tuple[Row, spectral.TruncatedSVD]:
    """The layer's row, without similarity yet, and its top-r spaces."""
    G = G.to(comm.device())
    norm = spectral.frobenius_norm(G)
    refuse_unusable(layer, [norm], config.init.method)
    smallest = min(layer.m, layer.n)
    svd = spectral.truncated_svd(G, max(layer.r, min(smallest, max(COVERAGE_RANKS))), _seed(layer, config), ANY_ERROR)
    covered = spectral.coverage(svd.S, norm**2, COVERAGE_RANKS)
    row = {
        "name": layer.name,
        "m": layer.m,
        "n": layer.n,
        "r": layer.r,
        "frobenius_norm": norm,
        "coverage": {rank: covered.get(rank, 1.0) for rank in COVERAGE_RANKS},  # beyond min(m, n) nothing is left
        "similarity": {},
    }
    r = layer.r
    return row, replace(svd, U=svd.U[:, :r].clone(), Vh=svd.Vh[:r].clone())


def _compared(
    layer: Target, few: torch.Tensor, many: torch.Tensor, scale: float, space: spectral.TruncatedSVD, config: Config
) -> dict[str, float]:
    """``scale`` makes of the sum over few samples the mean over their tokens."""
    few, many = few.to(comm.device()), many.to(comm.device())
    sign, magnitude = similarity(few, many, scale)
    svd = spectral.truncated_svd(few, layer.r, _seed(layer, config), ANY_ERROR)
    return {"sign": sign, "magnitude": magnitude, "overlap": spectral.subspace_overlap(svd, space, layer.r)}


def _seed(layer: Target, config: Config) -> int:
    return seed_of(config.train.seed, config.init.method, layer.name)
