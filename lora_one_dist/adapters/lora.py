"""LoRA pairs inside the model: PEFT's modules, as plain tensors outside ZeRO, and what they start from.

In: a loaded base, its targets, initial pairs.  Out: a list of :class:`Adapter`, the same bits on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_one_dist.adapters.branch import ADAPTER, AdaptedLinear
from lora_one_dist.adapters.dora import DoraLinear
from lora_one_dist.adapters.peft_settings import target_modules
from lora_one_dist.base.sharding import Base, add_low_rank, row_norms
from lora_one_dist.base.skeleton import DTYPES, ModelError
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.config.lora import LoraConfig, patterns_for
from lora_one_dist.initialise.pairs import Pairs


def peft_config(
    lora: LoraConfig, targets: Sequence[Target], base_path: str, times: int = 1, **changes: Any
) -> PeftLoraConfig:
    """PEFT's description of the adapters; all-linear becomes the list of module endings, as PEFT itself writes it.

    Each layer's rank and scale are the target's own, by patterns where it differs from the others.

    Args:
        times: every rank is so many times the target's, at the same scale.  changes: of single fields.
    """
    endings: list[str] | str = lora.target_modules
    if endings == "all-linear":
        endings = sorted({target.ending or target.name.rpartition(".")[2] for target in targets})
    if not isinstance(endings, str):
        endings = target_modules(endings, [target.name for target in targets])
    ranks = patterns_for({target.name: target.r for target in targets}, lora.r, lora.rank_pattern)
    alphas = patterns_for({t.name: lora.alpha_of(t.name) for t in targets}, lora.alpha, lora.alpha_pattern)
    grown = math.sqrt(times) if lora.use_rslora else times  # alpha / sqrt(r), or alpha / r, stays
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": times * lora.r,
        "lora_alpha": grown * lora.alpha,
        "rank_pattern": {pattern: times * r for pattern, r in ranks.items()},
        "alpha_pattern": {pattern: grown * alpha for pattern, alpha in alphas.items()},
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": endings,
        "exclude_modules": lora.exclude_modules,
        "bias": "none",
        "fan_in_fan_out": any(target.transposed for target in targets),
        "use_dora": lora.kind == "dora",
    }
    return PeftLoraConfig(**{**fields, **changes})


@dataclass(frozen=True)
class Adapter:
    """One target's pair, as PEFT's module holds it: ``A`` (r, n), ``B`` (m, r), and the frozen ``weight``, (m, n) or,
    ``target.transposed``, (n, m)."""

    target: Target
    A: nn.Parameter
    B: nn.Parameter
    weight: nn.Parameter
    more: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """What is trained beside the pair, or in its place, by the names of ``target.trained``."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names of ``target.trained``."""
        held = {"lora_A": self.A, "lora_B": self.B, **self.more}
        return {name: held[name] for name in self.target.trained}


def inject_adapters(base: Base, config: PeftLoraConfig, targets: Sequence[Target], dtype: str) -> list[Adapter]:
    """Put PEFT LoRA layers around the targets, outside ZeRO.  Not collective.  Returns them in target order."""
    inject_adapter_in_model(replace(config, use_dora=False), base.module)  # PEFT would gather each weight for a norm
    layers: dict[str, Any] = {n: module for n, module in base.module.named_modules() if isinstance(module, LoraLayer)}
    expected = {target.name for target in targets}
    if set(layers) != expected:
        raise ModelError(
            f"lora.target_modules: PEFT and the plan differ in {sorted(set(layers) ^ expected)[:3]}. Name the layers "
            "by longer endings."
        )
    adapters = []
    for target in targets:
        layer = layers[target.name]
        if type(layer) is lora.Linear:
            layer.__class__ = AdaptedLinear
        A: Any = layer.lora_A[ADAPTER]
        B: Any = layer.lora_B[ADAPTER]
        for module in (A, B):
            module.to(device=comm.device(), dtype=DTYPES[dtype])
        more = _beside(layer, target, DTYPES[dtype])
        for parameter in (A.weight, B.weight):
            parameter.requires_grad_("lora_A" in target.trained)
        adapters.append(Adapter(target, A.weight, B.weight, layer.base_layer.weight, more))
    return adapters


def _beside(layer: Any, target: Target, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Put into an adapted layer what it trains beside its pair, or in its place; zero until the pair is set."""
    shapes = {name: shape for name, shape in target.trained.items() if name not in ("lora_A", "lora_B")}
    made = {name: nn.Parameter(torch.zeros(shape, dtype=dtype, device=comm.device())) for name, shape in shapes.items()}
    if target.kind == "dora":
        DoraLinear.put(layer, made["lora_magnitude_vector"])
    for name in made.keys() & {"lora_R", "lora_E"}:
        layer.register_parameter(name, made[name])
        layer.scaling[ADAPTER] = target.scaling
    return made


def set_adapters(base: Base, adapters: Sequence[Adapter], pairs: Pairs, compensate: bool) -> dict[str, float]:
    """Write the pairs into the adapters and, to ``compensate``, ``W <- W - s B0 A0``.  Collective.

    The base is compensated with A0 and B0 as rounded to the working dtype, so that the start is exact up to the
    rounding of W itself.

    Returns:
        Per compensated layer ``||W' - (W - s B0 A0)||_F / ||s B0 A0||_F``: what that rounding lost.
    """
    squared_errors = torch.zeros(len(adapters), dtype=torch.float64)
    norms = []
    for i, adapter in enumerate(adapters):
        _set_pair(adapter, *pairs[adapter.target.name])
        if compensate:
            scaling = adapter.target.scaling
            pair = adapter.B.detach(), adapter.A.detach()
            left, right = (pair[1].T, pair[0].T) if adapter.target.transposed else pair
            squared_errors[i] = add_low_rank(adapter.weight, left, right, -scaling)
            norms.append(scaling * _product_norm(adapter.B.detach(), adapter.A.detach()))
        if "lora_magnitude_vector" in adapter.more:
            scaled = adapter.B.detach() * adapter.target.scaling
            found = row_norms(base, adapter.weight, scaled, adapter.A.detach(), adapter.target.transposed)
            adapter.more["lora_magnitude_vector"].detach().copy_(found)
    if not compensate:
        return {}
    comm.all_sum(squared_errors)
    squared_errors /= base.copies  # each rank rounded what it holds of one of them
    return {
        adapter.target.name: math.sqrt(squared_error) / norm
        for adapter, squared_error, norm in zip(adapters, squared_errors.tolist(), norms, strict=True)
    }


@torch.no_grad()
def set_frozen(adapters: Sequence[Adapter], pairs: Pairs) -> None:
    """Write pairs that do not train, as a checkpoint has them, to the bit.  Not collective."""
    for adapter in adapters:
        if adapter.target.name in pairs:
            adapter.A.copy_(pairs[adapter.target.name][0])
            adapter.B.copy_(pairs[adapter.target.name][1])


@torch.no_grad()
def set_magnitudes(adapters: Sequence[Adapter], magnitudes: Mapping[str, torch.Tensor]) -> None:
    """Let DoRA's rows that are given, by target, have these magnitudes.  Not collective."""
    for adapter in adapters:
        if adapter.target.name in magnitudes:
            adapter.more["lora_magnitude_vector"].copy_(magnitudes[adapter.target.name])


@torch.no_grad()
def _set_pair(adapter: Adapter, A: torch.Tensor, B: torch.Tensor) -> None:
    if "lora_R" in adapter.more:
        A, R, B = core_of(A, B)
        adapter.more["lora_R"].copy_(R)
    adapter.A.copy_(A)
    adapter.B.copy_(B)


def core_of(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``A (r, n), R (r, r), B (m, r)`` with orthonormal rows and columns, whose ``B R A`` is a pair's ``B A``.

    Of LoRA-SB's pair, whose own are orthogonal, R is diagonal.  On the host, in fp64: the same bits on every rank.
    """
    (columns, left), (rows, right) = (_positive_qr(matrix.double().cpu()) for matrix in (B, A.T))
    return rows.T.float(), (left @ right.T).float(), columns.float()


def _positive_qr(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q, and R with a diagonal that is not negative."""
    Q, R = torch.linalg.qr(matrix)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return Q * signs, R * signs[:, None]


def _product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """``||B A||_F`` from the r x r Grams."""
    B, A = B.double(), A.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))
