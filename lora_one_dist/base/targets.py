"""Which linear layers get an adapter.

In: a skeleton and the ``lora`` group of a config.  Out: the list of :class:`Target`, in forward order of definition.
Pure; the same on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.config.lora import LoraConfig, ends, matches


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter."""

    name: str
    """Dotted, of the module."""
    m: int
    """out_features."""
    n: int
    """in_features."""
    r: int
    """Its LoRA rank: ``lora.r`` or a pattern's, but at most what its shape and the initialisation allow."""
    scaling: float
    """s in W + s B A."""

    @property
    def adapter(self) -> int:
        """Adapter parameters."""
        return self.r * (self.m + self.n)


def find_targets(model: Any, lora: LoraConfig, rank_needed: int = 0) -> list[Target]:
    """The linear layers that ``target_modules`` names, in forward order of definition.  Pure.

    Args:
        rank_needed: singular vectors that the initialisation takes of a layer of rank ``lora.r``; of others it takes
            as many for each of their ranks.

    Raises:
        ModelError: for an ending or pattern that matches nothing (with the nearest), a layer that is no plain linear, a
            layer that shares its weight, or a rank that no layer it is for can have.
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
    _refuse_idle_exclusions(linear, lora)
    names = [name for name in names if not lora.excludes(name)]
    _refuse_shared(modules, names)
    for name in names:
        if not isinstance(modules[name], nn.Linear):
            raise ModelError(
                f"lora.target_modules: {name} is a {type(modules[name]).__name__}; only nn.Linear is supported. Leave "
                "it out."
            )
    if not names:
        raise ModelError(f"lora.target_modules = {lora.target_modules}: no layer left to adapt. Name at least one.")
    shapes = {name: (modules[name].out_features, modules[name].in_features) for name in names}
    ranks = _ranks(shapes, lora, max(1, rank_needed // lora.r))
    return [Target(name, *shapes[name], r, lora.scale(r, lora.alpha_of(name))) for name, r in ranks.items()]


def _ranks(shapes: Mapping[str, tuple[int, int]], lora: LoraConfig, vectors: int) -> dict[str, int]:
    """The rank of each layer: as asked, but no more than ``vectors`` singular vectors for each rank allow.

    Raises ModelError for patterns that match none, and where none of the layers that a rank is for can have it.
    """
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in shapes)]
        if idle:
            problems = " ".join(_matches_nothing(pattern, shapes) for pattern in idle)
            raise ModelError(f"lora.{key}: {problems}")
    ranks = {}
    for key, r in {"r": lora.r, **{f"rank_pattern.{p}": r for p, r in lora.rank_pattern.items()}}.items():
        pattern = key.partition(".")[2] or None
        asked = [name for name in shapes if _pattern_of(lora, name) == pattern]
        widest = max(asked, key=lambda name: min(shapes[name]), default=None)
        if widest is None:  # patterns before it take every layer
            continue
        most = min(shapes[widest])
        if r > most:
            raise ModelError(f"lora.{key} = {r}: must be at most min(m, n) = {most} of {widest}. Lower it.")
        if r * vectors > most:
            raise ModelError(
                f"lora.{key} = {r}: this init.method takes {r * vectors} singular vectors, {widest} has {most}. "
                f"Lower lora.{key}."
            )
        ranks.update({name: min(r, min(shapes[name]) // vectors) for name in asked})
    too_narrow = next((name for name, r in ranks.items() if r < 1), None)
    if too_narrow is not None:
        raise ModelError(
            f"lora.target_modules: {too_narrow} is {shapes[too_narrow]}; this init.method takes {vectors} singular "
            "vectors for each rank. Leave it out."
        )
    return {name: ranks[name] for name in shapes}


def _pattern_of(lora: LoraConfig, name: str) -> str | None:
    """The key of ``rank_pattern`` by which a layer has its rank."""
    return next((pattern for pattern in lora.rank_pattern if matches(pattern, name)), None)


def _refuse_idle_exclusions(linear: Iterable[str], lora: LoraConfig) -> None:
    """Raise ModelError for what ``exclude_modules`` names and no layer is."""
    given = lora.exclude_modules
    if isinstance(given, str):
        idle = [] if any(lora.excludes(name) for name in linear) else [given]
    else:
        idle = [ending for ending in given or () if not any(ends(ending, name) for name in linear)]
    if idle:
        raise ModelError("lora.exclude_modules: " + " ".join(_matches_nothing(item, linear) for item in idle))


def _matches_nothing(given: str, names: Iterable[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(given.rpartition(".")[2], leaves, n=3)
    hint = f"Did you mean {', '.join(near)}?" if near else f"Linear layers here: {', '.join(leaves)}."
    return f"{given!r} matches no layer. {hint}"


def _refuse_shared(modules: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ModelError for a target that shares its weight."""
    owners: dict[int, str] = {}
    for name, module in modules.items():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            shared = owners.setdefault(id(module.weight), name)
            if shared != name and (name in names or shared in names):
                raise ModelError(
                    f"lora.target_modules: {name} shares its weight with {shared}; its gradient would be the sum of "
                    "both. Leave it out of target_modules."
                )


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


def _match_endings(modules: Mapping[str, Any], endings: Sequence[str]) -> list[str]:
    """Names that equal an ending or end in '.ending': PEFT's rule.  Every ending must match."""
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    idle = [ending for ending in endings if not any(ends(ending, name) for name in modules if name)]
    if idle:
        raise ModelError("lora.target_modules: " + " ".join(_matches_nothing(ending, linear) for ending in idle))
    return [name for name in modules if any(ends(ending, name) for ending in endings)]
