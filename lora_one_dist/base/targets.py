"""Which linear layers get an adapter.

In: a skeleton and the ``lora`` group of a config.  Out: the list of :class:`Target`, in forward order of definition.
Pure; the same on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.config.settings import LoraConfig


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter: dotted module name, out_features m, in_features n."""

    name: str
    m: int
    n: int


def find_targets(model: Any, lora: LoraConfig, rank_needed: int = 0) -> list[Target]:
    """The linear layers that ``target_modules`` names, in forward order of definition.  Pure.

    Raises:
        ModelError: for an ending that matches nothing (with the nearest), a layer that is no plain linear, a layer that
            shares its weight, or r above min(m, n).
    """
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    _refuse_experts(model)
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    if lora.target_modules == "all-linear":
        if any(isinstance(module, Conv1D) for module in modules.values()):
            raise ModelError(
                "lora.target_modules = all-linear: the model has Conv1D layers (transposed weights), which are not "
                "supported. Use a model with plain linear layers."
            )
        names = [name for name in modules if name in linear and name != head]
    else:
        names = _match_endings(modules, lora.target_modules)
    targets = []
    owners: dict[int, str] = {}
    for name, module in modules.items():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            shared = owners.setdefault(id(module.weight), name)
            if shared != name and (name in names or shared in names):
                raise ModelError(
                    f"lora.target_modules: {name} shares its weight with {shared}; its gradient would be the sum of "
                    "both. Leave it out of target_modules."
                )
    for name in names:
        layer = modules[name]
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"lora.target_modules: {name} is a {type(layer).__name__}; only nn.Linear is supported. Leave it out."
            )
        targets.append(Target(name, layer.out_features, layer.in_features))
    if not targets:
        raise ModelError(f"lora.target_modules = {lora.target_modules}: no layer left to adapt. Name at least one.")
    narrowest = min(targets, key=lambda target: min(target.m, target.n))
    most = min(narrowest.m, narrowest.n)
    if lora.r > most:
        raise ModelError(f"lora.r = {lora.r}: must be at most min(m, n) = {most} of {narrowest.name}. Lower it.")
    if rank_needed > most:
        raise ModelError(
            f"lora.r = {lora.r}: this init.method takes {rank_needed} singular vectors, {narrowest.name} has {most}. "
            "Lower lora.r."
        )
    return targets


def _refuse_experts(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2 and "expert" in name:
            raise ModelError(
                f"model.path: {name} holds mixture-of-experts weights {tuple(parameter.shape)}; tokens reach experts "
                "unevenly, which the gradient phase does not support. Use a dense model."
            )
    for name, _ in model.named_modules():
        if name.endswith(".experts"):
            raise ModelError(
                f"model.path: {name} is a mixture of experts; tokens reach experts unevenly, which the gradient phase "
                "does not support. Use a dense model."
            )


def _match_endings(modules: dict[str, Any], endings: Sequence[str]) -> list[str]:
    """Names that equal an ending or end in '.ending': PEFT's rule.  Every ending must match."""
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    problems = []
    for ending in endings:
        if not any(name == ending or name.endswith(f".{ending}") for name in modules if name):
            near = difflib.get_close_matches(ending, leaves, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else f"Linear layers here: {', '.join(leaves)}."
            problems.append(f"{ending!r} matches no layer. {hint}")
    if problems:
        raise ModelError("lora.target_modules: " + " ".join(problems))
    return [name for name in modules if any(name == end or name.endswith(f".{end}") for end in endings)]
