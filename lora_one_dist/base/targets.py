"""Which linear layers get an adapter.

In: a skeleton and the ``lora`` group of a config.  Out: the list of :class:`Target`, in forward order of definition.
Pure; the same on every rank.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one_dist.base import probe
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.config.lora import LoraConfig, ends, matches

# Of state-space models, whose kernels read these layers' weights (peft.tuners.tuners_utils, 0.21).
PEFT_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
PEFT_MAMBA_LAYERS = ("out_proj", "conv1d")


LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's: a linear layer whose weight is (n, m)


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
    transposed: bool = False
    """Is the weight (n, m), as that of a Conv1D (GPT-2)?"""
    ending: str = ""
    """Of its name, where the last part alone would name other modules too; for PEFT, which goes by endings."""
    kind: str = "lora"
    """``lora.kind``."""

    @property
    def pair(self) -> int:
        """Elements of A and B."""
        return self.r * (self.m + self.n)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is trained of it, by the names that PEFT's layers have for it (lora_R: LoRA-SB's core).

        Of AdaLoRA's lora_E the diagonal.
        """
        if self.kind == "lora_sb":
            return {"lora_R": (self.r, self.r)}
        found: dict[str, tuple[int, ...]] = {"lora_A": (self.r, self.n), "lora_B": (self.m, self.r)}
        more: dict[str, dict[str, tuple[int, ...]]] = {
            "dora": {"lora_magnitude_vector": (self.m,)},
            "adalora": {"lora_E": (self.r,)},
        }
        return found | more.get(self.kind, {})

    @property
    def adapter(self) -> int:
        """Elements that are trained."""
        return sum(map(math.prod, self.trained.values()))


def find_targets(model: Any, lora: LoraConfig, rank_needed: int = 0, changes_base: bool = False) -> list[Target]:
    """The targets of :func:`choose`."""
    return choose(model, lora, rank_needed, changes_base)[0]


def choose(
    model: Any, lora: LoraConfig, rank_needed: int = 0, changes_base: bool = False
) -> tuple[list[Target], dict[str, str]]:
    """The linear layers that ``target_modules`` names, in forward order of definition.  Pure.

    Args:
        rank_needed: singular vectors that the initialisation takes of a layer of rank ``lora.r``; of others it takes
            as many for each of their ranks.
        changes_base: does the initialisation change the weights of targets?  Then they must be theirs alone.

    Returns:
        The targets; and what all-linear leaves out besides the head, by name: why (:func:`_unsuited`).

    Raises:
        ModelError: for an ending or pattern that matches nothing (with the nearest), a layer that is no plain linear or
            cannot be adapted, or a rank that no layer it is for can have.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, LINEAR)]
    refuse_experts(model)
    _refuse_idle_exclusions(linear, lora)
    if lora.target_modules == "all-linear":
        head = model.get_output_embeddings()
        named = [name for name in linear if modules[name] is not head]
    else:
        named = _match_endings(modules, lora.target_modules)
    unsuited = _unsuited(model, modules) | (_shared(modules) if changes_base else {})
    names, left_out = _suited(modules, [name for name in named if not lora.excludes(name)], lora, unsuited)
    if not names:
        raise ModelError(f"lora.target_modules = {lora.target_modules}: no layer left to adapt. Name at least one.")
    transposed = {name: isinstance(modules[name], Conv1D) for name in names}
    shapes = {name: _out_in(modules[name]) for name in names}
    ranks, endings = _ranks(shapes, lora, max(1, rank_needed // lora.r)), _endings(modules, names, lora)
    targets = [
        Target(
            name,
            *shapes[name],
            r,
            lora.scale(r, lora.alpha_of(name)),
            transposed[name],
            endings.get(name, ""),
            lora.kind,
        )
        for name, r in ranks.items()
    ]
    return targets, left_out


def _out_in(layer: Any) -> tuple[int, int]:
    """m and n of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def _suited(
    modules: Mapping[str, Any], names: Sequence[str], lora: LoraConfig, unsuited: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Of these layers those that can be adapted, and what all-linear leaves out; in a list that is refused."""
    unsuited = {name: why for name, why in unsuited.items() if name in names}
    if lora.target_modules == "all-linear":
        routers = {name: "is a router" for name in _routers(modules) if name in names}
        unsuited |= routers | {name: "is of width 1" for name in names if min(modules[name].weight.shape) == 1}
        return [name for name in names if name not in unsuited], unsuited
    for name in names:
        if not isinstance(modules[name], LINEAR):
            raise ModelError(
                f"lora.target_modules: {name} is a {type(modules[name]).__name__}; only nn.Linear and Conv1D are "
                "supported. Leave it out."
            )
    if unsuited:
        name, why = next(iter(unsuited.items()))
        more = f", and {len(unsuited) - 1} more like it" if len(unsuited) > 1 else ""
        raise ModelError(f"lora.target_modules: {name} {why}{more}. Leave it out, or name it in lora.exclude_modules.")
    return list(names), {}


def _unsuited(model: Any, modules: Mapping[str, Any]) -> dict[str, str]:
    """Linear layers that no adapter can go around, and why: by what a pass over text does with them."""
    found: dict[str, str] = {}
    passed = probe.run(model)
    if passed is not None:
        found |= {name: "has no part in the logits" for name in passed.calls if name not in passed.in_logits}
        found |= {name: "is not called for text" for name, count in passed.calls.items() if count == 0}
        found |= {name: "returns more than one tensor" for name in passed.no_tensor}
    if getattr(model.config, "model_type", None) in PEFT_MAMBA_TYPES:
        found |= {name: "is one that PEFT refuses" for name in modules if name.rpartition(".")[2] in PEFT_MAMBA_LAYERS}
    return found


def _routers(modules: Mapping[str, Any]) -> list[str]:
    """Linear layers beside stacked experts, a matrix for each, with an output for each of them.

    Not those of a shared expert that is as wide as there are experts: a router is alone in what it lies in.
    """
    count: dict[str, set[int]] = {}  # of the experts around which a module is, by its name
    linear = [name for name, layer in modules.items() if isinstance(layer, nn.Linear)]
    inside = {name: name.rpartition(".")[0] for name in linear}
    siblings = Counter(inside.values())
    for name, module in modules.items():
        stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
        if stacked and not isinstance(module, nn.Conv1d):
            for around in (name, name.rpartition(".")[0]):
                count.setdefault(around, set()).update(stacked)
    found = []
    for name in linear:
        blocks = [inside[name]]
        if siblings[inside[name]] == 1:
            blocks.append(inside[name].rpartition(".")[0])
        if any(modules[name].out_features in count.get(block, ()) for block in blocks):
            found.append(name)
    return found


def _endings(modules: Mapping[str, Any], names: Sequence[str], lora: LoraConfig) -> dict[str, str]:
    """The shortest endings that mean targets alone, of targets whose last part also means another module."""
    taken: dict[str, list[str]] = {}  # other modules by the last part of their names
    for name in modules.keys() - {"", *names}:
        if not lora.excludes(name):
            taken.setdefault(name.rpartition(".")[2], []).append(name)
    found = {}
    for name in names:
        rivals, parts = taken.get(name.rpartition(".")[2], []), name.split(".")
        if rivals:
            tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            found[name] = next((tail for tail in tails if not any(ends(tail, rival) for rival in rivals)), name)
    return found


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


def _shared(modules: Mapping[str, Any]) -> dict[str, str]:
    """Layers that share their weight, and with which other."""
    owners: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            owner = owners.setdefault(id(module.weight), name)
            if owner != name:
                why = "shares its weight with {}, and this init.method changes it (lora_one does not)"
                found |= {name: why.format(owner), owner: why.format(name)}
    return found


def refuse_experts(model: Any) -> None:
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
    linear = [name for name, module in modules.items() if isinstance(module, LINEAR)]
    idle = [ending for ending in endings if not any(ends(ending, name) for name in modules if name)]
    if idle:
        raise ModelError("lora.target_modules: " + " ".join(_matches_nothing(ending, linear) for ending in idle))
    return [name for name in modules if any(ends(ending, name) for ending in endings)]
