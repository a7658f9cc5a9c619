"""From a frozen base and a few samples to initial adapters, the same bits on every rank.

In: base without adapters, targets, the init batch.  Out: ``{name: (A0 (r, n), B0 (m, r))}`` fp32 on every rank, and a
report row per layer.  Runs on every rank.  Phases, for each of ``layer_groups`` runs of layers in turn:

1. gradient   every layer's G (or, for pissa, W) is summed on its owner
2. svd        every owner decomposes its layers, all owners at once, no communication
3. broadcast  each owner sends its pairs as one flat fp32 tensor

A run keeps each group that is done on disk: one that failed after it does not repeat it.

Peak bytes per rank: phase 1 as in :mod:`lora_one_dist.plan.memory`; phase 2 the owned matrices plus one SVD
(:mod:`lora_one_dist.initialise.spectral`); the pairs themselves are ``4 sum(r (m + n))``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_one_dist.base.dropout import dropout_off
from lora_one_dist.base.loss import loss_sum
from lora_one_dist.base.sharding import Base
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm, ownership
from lora_one_dist.config.initialise import InitConfig
from lora_one_dist.config.seeds import seed_of
from lora_one_dist.config.settings import Config
from lora_one_dist.initialise import spectral
from lora_one_dist.initialise.gradient import GradientError, MicroBatch, full_gradient

COVERAGE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[str, int, int], None]  # label, done, total
Phase = Callable[[str], AbstractContextManager[None]]  # entered around the phase of that name
# Largest relative change of the loss by rounding alone, for methods that must not move it: sums of fp32 terms, and
# W - s B0 A0 rounded to bf16 (relative 2^-9 of each weight). A wrong sign or scale moves the loss by tens of per cent.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


class InitError(RuntimeError):
    """The initialisation contradicts what the method promises."""


@dataclass
class Initialisation:
    """Initial pairs on every rank, a report row per layer, and the init batch's loss at the pre-trained weights."""

    pairs: Pairs = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    loss: float | None = None

    def add(self, part: Initialisation) -> None:
        """Those of another layer group of the same batch."""
        self.pairs |= part.pairs
        self.rows += part.rows
        self.loss = part.loss


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose gradients are taken in one pass over the init batch, and the rank that owns each."""

    number: int
    """From 1, of ``count``."""
    count: int
    layers: tuple[Target, ...]
    owners: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"init-{self.number}-of-{self.count}"

    @property
    def label(self) -> str:
        """In front of lines of progress; nothing if there is one group only."""
        return f"layer group {self.number}/{self.count}: " if self.count > 1 else ""

    @property
    def owned_here(self) -> list[Target]:
        """Those of this rank."""
        return [layer for layer, owner in zip(self.layers, self.owners, strict=True) if owner == comm.rank()]


def singular_vectors_needed(init: InitConfig, r: int) -> int:
    """How many triplets an initialisation takes from one matrix: 2r for lora_ga, 0 where it takes no SVD."""
    if not init.takes_svd:
        return 0
    return 2 * r if init.method == "lora_ga" else r


def layer_groups(targets: Sequence[Target], count: int) -> list[LayerGroup]:
    """Cut the targets into at most ``count`` runs of near-equal cost, and share each out.  The same on every rank."""
    cost = [float(target.m * target.n) for target in targets]
    runs = ownership.split(cost, count)
    return [
        LayerGroup(
            number,
            len(runs),
            tuple(targets[i] for i in run),
            tuple(ownership.assign([cost[i] for i in run], comm.world_size())),
        )
        for number, run in enumerate(runs, start=1)
    ]


def initial_pairs(
    base: Base,
    targets: Sequence[Target],
    config: Config,
    batch: Sequence[Sequence[MicroBatch]],
    progress: Progress = lambda label, done, total: None,
    phase: Phase = lambda name: nullcontext(),
) -> Initialisation:
    """Compute A0 and B0 of every target by ``config.init.method``.  Collective.

    Args, Raises: as :func:`initialise_group`.
    """
    result = Initialisation()
    for group in layer_groups(targets, config.init.layer_groups):
        result.add(initialise_group(base, group, config, batch, progress, phase))
    return result


def initialise_group(
    base: Base,
    group: LayerGroup,
    config: Config,
    batch: Sequence[Sequence[MicroBatch]],
    progress: Progress,
    phase: Phase,
) -> Initialisation:
    """The three phases for one group of layers.  Collective.

    Args:
        batch: this rank's micro-batches in one or two parts (:func:`gradient.deal_micro_batches`); two parts add the
            overlap of their top-r spaces to the report.  Unused where no gradient is taken.
        progress: told what was done.  phase: entered around each phase, by name.

    Raises:
        GradientError, RankError: if a gradient is zero or not finite, naming the layer, on every rank.
    """
    result = Initialisation()
    matrices: list[dict[str, torch.Tensor]] = []
    if config.init.takes_gradient:
        with phase("gradient"):
            matrices, result.loss = gradients(base, group, config, batch, progress)
    elif config.init.takes_svd:
        with phase("gather weights"):
            matrices = [_weights(base, group, config.init.buffer)]
    own: Pairs = {}
    with phase("svd"), comm.all_or_none("initialising adapters"):
        owned = group.owned_here
        for done, target in enumerate(owned, start=1):
            own[target.name], row = _decompose(target, [part.pop(target.name) for part in matrices], config)
            result.rows.append({**row, "owner": comm.rank()})
            progress(f"{group.label}svd of this rank's layers", done, len(owned))
    with phase("broadcast"):
        result.pairs = _broadcast(group, own)
    result.rows = [row for rows in comm.all_gather_object(result.rows) for row in rows]
    order = {layer.name: i for i, layer in enumerate(group.layers)}
    result.rows.sort(key=lambda row: order[row["name"]])
    return result


def gradients(
    base: Base, group: LayerGroup, config: Config, batch: Sequence[Sequence[MicroBatch]], progress: Progress
) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Owned gradients of each part of the batch, and the loss of the whole."""
    total, done = sum(len(part) for part in batch), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(f"{group.label}gradient, micro-batches of this rank", done, total)

    parts, loss = [], 0.0
    for part in batch:
        owned, part_loss = full_gradient(base, group.layers, group.owners, part, config.init.buffer, tick)
        parts.append(owned)
        loss += part_loss
    return parts, loss


def _weights(base: Base, group: LayerGroup, buffer: str) -> dict[str, torch.Tensor]:
    """The targets' weights in fp32, each on its owner."""
    device = torch.device("cpu") if buffer == "host" else comm.device()
    owned = {}
    for target, owner in zip(group.layers, group.owners, strict=True):
        weight = base.module.get_submodule(target.name).weight
        with base.gathered([weight]):
            if owner == comm.rank():
                weight = weight.detach().T.contiguous() if target.transposed else weight.detach()
                owned[target.name] = weight.to(device, torch.float32, copy=True)
    return owned


def _decompose(
    target: Target, parts: list[torch.Tensor], config: Config
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """A0, B0 and the report row of one layer from its matrix, given as parts to sum (none without an SVD)."""
    started = time.monotonic()
    method, r = config.init.method, target.r
    row: dict[str, Any] = {"name": target.name, "m": target.m, "n": target.n, "r": r}
    seed = seed_of(config.train.seed, method, target.name)
    if not config.init.takes_svd:
        A0, B0 = _drawn(target, config, seed)
        return (A0.to(comm.device()), B0.to(comm.device())), {**row, "seconds": time.monotonic() - started}
    parts = [part.to(comm.device()) for part in parts]
    norms = [spectral.frobenius_norm(part) for part in parts]
    refuse_unusable(target, norms, method)
    needed = singular_vectors_needed(config.init, r)
    overlap = None
    if len(parts) == 2:
        # A report to two digits: the first iterations are enough.
        first, second = (spectral.truncated_svd(part, r, seed, math.inf) for part in parts)
        overlap = spectral.subspace_overlap(first, second, r)
        parts[0] += parts.pop()
        norms = [spectral.frobenius_norm(parts[0])]
    matrix = parts.pop()
    if method == "lora_sb":
        matrix.sign_()
        norms = [spectral.frobenius_norm(matrix)]
    svd = spectral.truncated_svd(matrix, needed, seed, config.init.svd_tolerance)
    pair = _pair(svd, target, config)
    row |= {
        "seconds": time.monotonic() - started,
        "frobenius_norm": norms[0],
        "singular_values": svd.S[: max(needed, max(COVERAGE_RANKS))].tolist(),
        "certified_error": svd.error,
        "relative_gap": svd.gap,
        "svd_blocks": svd.blocks,
        "coverage": spectral.coverage(svd.S, norms[0] ** 2, tuple(sorted({*COVERAGE_RANKS, r}))),
        "half_overlap": overlap,
    }
    return pair, row


def _drawn(target: Target, config: Config, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0 of the methods that look at no matrix, on the host: the same wherever they are drawn."""
    if config.init.method == "lora":
        start = spectral.gaussian if target.kind == "adalora" else spectral.kaiming
        return start(target.m, target.n, target.r, seed)
    return spectral.random_directions(target.m, target.n, target.r, _scale(target, config), seed)


def _scale(target: Target, config: Config) -> float:
    """Of lora_ga's directions."""
    return spectral.stable_scale(target.m, config.gamma) if config.init.stable_output else 1 / target.scaling


def _pair(svd: spectral.TruncatedSVD, target: Target, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0 by the method's form."""
    init, r = config.init, target.r
    if init.method == "pissa":
        return spectral.pissa(svd, r, target.scaling)
    if init.method == "lora_sb":
        return spectral.lora_sb(svd, r, config.optim.lr / target.scaling)
    if init.method == "lora_one":
        return spectral.lora_one(svd, r, config.gamma)
    if init.method == "lora_one_v1":
        return spectral.lora_one_v1(svd, r, config.gamma)
    return spectral.lora_ga(svd, r, init.scheme, _scale(target, config))


def refuse_unusable(target: Target, norms: Sequence[float], method: str) -> None:
    """Raise GradientError for a matrix whose parts have no usable Frobenius norm."""
    fault = None
    if not all(map(math.isfinite, norms)):
        fault = "not finite"
    elif not any(norms):
        fault = "zero"
    if fault is not None:
        raise GradientError(
            f"{target.name}: its {'weight' if method == 'pissa' else 'gradient'} is {fault}; no direction can be taken "
            "from it. Check the data and the model, or leave the layer out of lora.target_modules."
        )


def _broadcast(group: LayerGroup, own: Pairs) -> Pairs:
    """Every owner's pairs to every rank, one flat tensor an owner."""
    pairs: Pairs = {}
    for owner in range(comm.world_size()):
        its = [layer for layer, of in zip(group.layers, group.owners, strict=True) if of == owner]
        if not its:
            continue
        sizes = [size for layer in its for size in (layer.r * layer.n, layer.m * layer.r)]
        if owner == comm.rank():
            flat = torch.cat([tensor.reshape(-1) for layer in its for tensor in own[layer.name]])
        else:
            flat = torch.empty(sum(sizes), device=comm.device())
        comm.broadcast(flat, owner)
        pieces = iter(flat.split(sizes))
        for layer in its:
            pairs[layer.name] = (next(pieces).view(layer.r, layer.n), next(pieces).view(layer.m, layer.r))
    return pairs


def batch_loss(base: Base, micro_batches: Sequence[MicroBatch]) -> float:
    """Weighted loss over all ranks' micro-batches, train mode with dropout off, no gradient.  Collective."""
    loss = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), dropout_off(base.module):
        for micro_batch in micro_batches:
            loss += loss_sum(base.module, micro_batch.tensors, micro_batch.weight).double().cpu()
    base.release_all()
    return float(comm.all_sum(loss))


def check_loss(before: float, after: float, config: Config) -> None:
    """A wrong sign, scale or compensation shows here at any size.  Not collective (both losses are global).

    Raises:
        InitError: if ``lora_one`` did not lower the loss of its own batch, or another method moved it.
    """
    method = config.init.method
    if not math.isfinite(after):
        raise InitError(f"init.method {method}: the loss of the init batch went from {before:.6g} to {after}.")
    if method == "lora_one":
        if after >= before:
            raise InitError(
                f"init.method lora_one: the loss of the init batch rose from {before:.6g} to {after:.6g}, but a step "
                f"down the gradient must lower it: the step is too large. Raise init.gamma above {config.gamma:g}."
            )
        return
    if method == "lora_sb":  # a step along signs may raise it, as AdamW's own first step may
        return
    tolerance = LOSS_TOLERANCE[config.model.dtype]
    remedy = "Raise init.gamma or use fp32" if config.init.has_gamma else "Use fp32"
    if abs(after - before) > tolerance * max(1.0, before):
        raise InitError(
            f"init.method {method}: the loss of the init batch moved from {before:.6g} to {after:.6g}, more than the "
            f"rounding of {config.model.dtype} explains ({tolerance:g} relative). {remedy}."
        )
