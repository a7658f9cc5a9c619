"""From a frozen base and a few samples to initial adapters, the same bits on every rank.

In: base without adapters, targets, the init batch.  Out: ``{name: (A0 (r, n), B0 (m, r))}`` fp32 on every rank, and a
report row per layer.  Runs on every rank.  Phases, for each of ``layer_groups`` runs of layers in turn:

1. gradient   every layer's G (or, for pissa, W) is summed on its owner
2. svd        every owner decomposes its layers, all owners at once, no communication
3. broadcast  each owner sends its pairs as one flat fp32 tensor

A group that is done can be kept on disk (:class:`Kept`): a run that failed after it does not repeat it.

Peak bytes per rank: phase 1 as in :mod:`lora_one_dist.planner`; phase 2 the owned matrices plus one SVD
(:mod:`lora_one_dist.spectral`); the pairs themselves are ``4 r sum(m + n)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lora_one_dist import comm, ownership, spectral
from lora_one_dist.config import GRADIENT_METHODS, Config
from lora_one_dist.gradient import GradientError, MicroBatch, full_gradient
from lora_one_dist.model import Adapter, Target, dropout_off, loss_sum
from lora_one_dist.sharding import Base, add_low_rank

COVERAGE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
Progress = Callable[[str, int, int], None]  # label, done, total

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


class Kept(Protocol):
    """Layer groups that outlive a process.  Both are collective."""

    def load(self, number: int, groups: int) -> Initialisation | None:
        """Group ``number`` (from 1) of so many, if it was kept."""

    def save(self, number: int, groups: int, part: Initialisation, owned: set[str]) -> None:
        """Keep it; this rank owns the layers of these names."""


def singular_vectors_needed(method: str, r: int) -> int:
    """How many triplets a method takes from one matrix: 2r for lora_ga, 0 for lora."""
    return {"lora": 0, "lora_ga": 2 * r}.get(method, r)


def initial_pairs(
    base: Base,
    targets: Sequence[Target],
    config: Config,
    batch: Sequence[Sequence[MicroBatch]],
    progress: Progress = lambda label, done, total: None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    kept: Kept | None = None,
) -> Initialisation:
    """Compute A0 and B0 of every target by ``config.init.method``.  Collective.

    Args:
        batch: this rank's micro-batches in one or two parts (:func:`gradient.deal_micro_batches`); two parts add the
            overlap of their top-r spaces to the report.  Unused by ``pissa`` and ``lora``.
        progress: told what was done.  phase: entered around each phase, by name.
        kept: where finished layer groups are kept, and found by a later process.

    Raises:
        GradientError, RankError: if a gradient is zero or not finite, naming the layer, on every rank.
    """
    result = Initialisation()
    gradient_cost = [float(target.m * target.n) for target in targets]
    groups = ownership.split(gradient_cost, config.init.layer_groups)
    for number, group in enumerate(groups, start=1):
        layers = [targets[i] for i in group]
        owners = ownership.assign([gradient_cost[i] for i in group], comm.world_size())
        label = f"layer group {number}/{len(groups)}: " if len(groups) > 1 else ""
        part = kept.load(number, len(groups)) if kept is not None else None
        if part is None:
            part = _initialise_group(base, layers, owners, config, batch, progress, phase, label)
            if kept is not None:
                owned = {layer.name for layer, owner in zip(layers, owners, strict=True) if owner == comm.rank()}
                kept.save(number, len(groups), part, owned)
        result.pairs |= part.pairs
        result.rows += part.rows
        result.loss = part.loss
    return result


def _initialise_group(
    base: Base,
    layers: Sequence[Target],
    owners: Sequence[int],
    config: Config,
    batch: Sequence[Sequence[MicroBatch]],
    progress: Progress,
    phase: Callable[[str], AbstractContextManager[None]],
    label: str,
) -> Initialisation:
    """The three phases for one group of layers."""
    method = config.init.method
    result = Initialisation()
    matrices: list[dict[str, torch.Tensor]] = []
    if method in GRADIENT_METHODS:
        with phase("gradient"):
            matrices, result.loss = _gradients(base, layers, owners, config, batch, progress, label)
    elif method == "pissa":
        with phase("gather weights"):
            matrices = [_weights(base, layers, owners, config.init.buffer)]
    own: Pairs = {}
    with phase("svd"), comm.all_or_none("initialising adapters"):
        owned = [layer for layer, owner in zip(layers, owners, strict=True) if owner == comm.rank()]
        for done, target in enumerate(owned, start=1):
            own[target.name], row = _decompose(target, [part.pop(target.name) for part in matrices], config)
            result.rows.append({**row, "owner": comm.rank()})
            progress(f"{label}svd of this rank's layers", done, len(owned))
    with phase("broadcast"):
        result.pairs = _broadcast(layers, owners, own, config.lora.r)
    result.rows = [row for rows in comm.all_gather_object(result.rows) for row in rows]
    order = {layer.name: i for i, layer in enumerate(layers)}
    result.rows.sort(key=lambda row: order[row["name"]])
    return result


def _gradients(
    base: Base,
    layers: Sequence[Target],
    owners: Sequence[int],
    config: Config,
    batch: Sequence[Sequence[MicroBatch]],
    progress: Progress,
    label: str,
) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Owned gradients of each part of the batch, and the loss of the whole."""
    total, done = sum(len(part) for part in batch), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(f"{label}gradient, micro-batches of this rank", done, total)

    parts, loss = [], 0.0
    for part in batch:
        owned, part_loss = full_gradient(base, layers, owners, part, config.init.buffer, tick)
        parts.append(owned)
        loss += part_loss
    return parts, loss


def _weights(base: Base, layers: Sequence[Target], owners: Sequence[int], buffer: str) -> dict[str, torch.Tensor]:
    """The targets' weights in fp32, each on its owner."""
    device = torch.device("cpu") if buffer == "host" else comm.device()
    owned = {}
    for target, owner in zip(layers, owners, strict=True):
        weight = base.module.get_submodule(target.name).weight
        with base.gathered([weight]):
            if owner == comm.rank():
                owned[target.name] = weight.detach().to(device, torch.float32, copy=True)
    return owned


def _decompose(
    target: Target, parts: list[torch.Tensor], config: Config
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """A0, B0 and the report row of one layer from its matrix, given as parts to sum (none for ``lora``)."""
    started = time.monotonic()
    method, r = config.init.method, config.lora.r
    row: dict[str, Any] = {"name": target.name, "m": target.m, "n": target.n}
    seed = spectral.seed_of(config.train.seed, method, target.name)
    if method == "lora":
        A0, B0 = spectral.kaiming(target.m, target.n, r, seed)
        return (A0.to(comm.device()), B0.to(comm.device())), {**row, "seconds": time.monotonic() - started}
    parts = [part.to(comm.device()) for part in parts]
    norms = [spectral.frobenius_norm(part) for part in parts]
    _refuse_unusable(target, norms, method)
    needed = singular_vectors_needed(method, r)
    overlap = None
    if len(parts) == 2:
        # A report to two digits: the first iterations are enough.
        first, second = (spectral.truncated_svd(part, r, seed, math.inf) for part in parts)
        overlap = spectral.subspace_overlap(first, second, r)
        parts[0] += parts.pop()
        norms = [spectral.frobenius_norm(parts[0])]
    svd = spectral.truncated_svd(parts.pop(), needed, seed, config.init.svd_tolerance)
    if method == "pissa":
        pair = spectral.pissa(svd, r, config.scaling)
    else:
        form = {"lora_one": spectral.lora_one, "lora_one_v1": spectral.lora_one_v1, "lora_ga": spectral.lora_ga}[method]
        pair = form(svd, r, config.gamma)
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


def _refuse_unusable(target: Target, norms: Sequence[float], method: str) -> None:
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


def _broadcast(layers: Sequence[Target], owners: Sequence[int], own: Pairs, r: int) -> Pairs:
    """Every owner's pairs to every rank, one flat tensor an owner."""
    pairs: Pairs = {}
    for owner in range(comm.world_size()):
        its = [layer for layer, of in zip(layers, owners, strict=True) if of == owner]
        if not its:
            continue
        sizes = [size for layer in its for size in (r * layer.n, layer.m * r)]
        if owner == comm.rank():
            flat = torch.cat([tensor.reshape(-1) for layer in its for tensor in own[layer.name]])
        else:
            flat = torch.empty(sum(sizes), device=comm.device())
        comm.broadcast(flat, owner)
        pieces = iter(flat.split(sizes))
        for layer in its:
            pairs[layer.name] = (next(pieces).view(r, layer.n), next(pieces).view(layer.m, r))
    return pairs


def set_adapters(
    base: Base, adapters: Sequence[Adapter], pairs: Pairs, scaling: float, compensate: bool
) -> dict[str, float]:
    """Write the pairs into the adapters and, to ``compensate``, ``W <- W - s B0 A0``.  Collective.

    The base is compensated with A0 and B0 as rounded to the working dtype, so that the start is exact up to the
    rounding of W itself.

    Returns:
        Per compensated layer ``||W' - (W - s B0 A0)||_F / ||s B0 A0||_F``: what that rounding lost.
    """
    squared_errors = torch.zeros(len(adapters), dtype=torch.float64)
    norms = []
    for i, adapter in enumerate(adapters):
        with torch.no_grad():
            for parameter, value in zip((adapter.A, adapter.B), pairs[adapter.target.name], strict=True):
                parameter.copy_(value)
        if compensate:
            squared_errors[i] = add_low_rank(adapter.weight, adapter.B.detach(), adapter.A.detach(), -scaling)
            norms.append(scaling * _product_norm(adapter.B.detach(), adapter.A.detach()))
    if not compensate:
        return {}
    comm.all_sum(squared_errors)
    squared_errors /= base.copies  # each rank rounded what it holds of one of them
    return {
        adapter.target.name: math.sqrt(squared_error) / norm
        for adapter, squared_error, norm in zip(adapters, squared_errors.tolist(), norms, strict=True)
    }


def _product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """``||B A||_F`` from the r x r Grams."""
    B, A = B.double(), A.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def batch_loss(base: Base, micro_batches: Sequence[MicroBatch]) -> float:
    """Weighted loss over all ranks' micro-batches, train mode with dropout off, no gradient.  Collective."""
    loss = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), dropout_off(base.module):
        for micro_batch in micro_batches:
            loss += loss_sum(base.module, micro_batch.tensors, micro_batch.weight).double().cpu()
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
    tolerance = LOSS_TOLERANCE[config.model.dtype]
    if abs(after - before) > tolerance * max(1.0, before):
        raise InitError(
            f"init.method {method}: the loss of the init batch moved from {before:.6g} to {after:.6g}, more than the "
            f"rounding of {config.model.dtype} explains ({tolerance:g} relative). Raise init.gamma or use fp32."
        )
