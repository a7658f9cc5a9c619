"""Adapters on disk, as PEFT folders.

In: adapters (the same on every rank).  Out: ``adapter_config.json`` and ``adapter_model.safetensors`` that
``PeftModel.from_pretrained`` loads on the untouched base, as bytes or as a folder.  Nothing here is collective.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors import safe_open
from safetensors.torch import save

from lora_one_dist.adapters import peft_format, peft_settings
from lora_one_dist.adapters.lora import Adapter, peft_config
from lora_one_dist.adapters.peft_format import PREFIX, TOKENS
from lora_one_dist.adapters.tables import TrainedTable
from lora_one_dist.base.tables import Table
from lora_one_dist.base.targets import Target
from lora_one_dist.config.settings import Config, LoraConfig
from lora_one_dist.disk import folders
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed
from lora_one_dist.disk.weights import WeightsError
from lora_one_dist.initialise.pairs import Pairs

TABLES = ("modules_to_save", "trainable_token_indices")
FROZEN = "lora_sb.safetensors"
MERGE_FIRST = "merge it with tools/merge_adapter.py and begin from what comes out"


class AdapterError(ValueError):
    """A PEFT folder that does not fit the run: value, rule, remedy."""


@dataclass(frozen=True)
class Beside:
    """What an adapter's folder holds beside pairs: trained tables, and the tokenizer where it has new tokens."""

    tables: Sequence[TrainedTable] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    task_type: str = "CAUSAL_LM"
    """PEFT's name for what the model is trained on."""

    @property
    def settings(self) -> dict[str, Any]:
        """PEFT's for these.  Full names: endings could name a tower's too.

        Of tied whole ones both: PEFT 0.21 knows by itself of a head that is tied to ``embed_tokens`` alone.
        """
        rows = {t.plan.modules[0]: list(t.plan.new) for t in self.tables if not t.plan.whole}
        whole = [table.plan.modules for table in self.tables if table.plan.whole]
        changes: dict[str, Any] = {"task_type": self.task_type}
        if rows:
            changes["trainable_token_indices"] = rows
        if whole:
            changes |= {"modules_to_save": [*chain(*whole)], "ensure_weight_tying": len(whole[0]) > 1}
        return changes

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tables by PEFT's names: whole ones that are tied under both."""
        return {
            name: table.weight.detach().cpu().clone()
            for table in self.tables
            for name in _names(table.plan)[: table.plan.names]
        }


NOTHING = Beside()


def _names(table: Table) -> list[str]:
    """What PEFT may call its tensor: of tied modules under either."""
    return [f"{PREFIX}{module}.{'weight' if table.whole else TOKENS}" for module in table.modules]


def export(
    folder: Path,
    config: Config,
    adapters: Sequence[Adapter],
    targets: Sequence[Target],
    initial: Pairs | None,
    beside: Beside = NOTHING,
) -> None:
    """Write the adapters as they are now, in place of an older folder of that name.  Call on one rank.

    Args:
        initial, beside: as in :func:`encode`.
    """
    folders.replace(folder, encode(config, adapters, targets, initial, beside))


def encode(
    config: Config,
    adapters: Sequence[Adapter],
    targets: Sequence[Target],
    initial: Pairs | None,
    beside: Beside = NOTHING,
) -> dict[str, bytes]:
    """The files of a PEFT folder, by name, with the adapters as they are now.

    Args:
        initial: A0, B0 as set, for methods that changed the base: the export then has rank 2r and fp32,
            ``lora_A = [A; A0]``, ``lora_B = [B | -B0]``, and the same scale s, so that it holds on the untouched base:
            ``W + s (B A - B0 A0)``.  None for methods that did not.
    """
    lora = config.lora
    more = {**beside.tensors, **_magnitudes(adapters)}
    if initial is None:
        pruned = lora.kind == "adalora"
        pairs = _without_pruned(adapters, lora) if pruned else {a.target.name: _pair_of(a) for a in adapters}
        targets = [replace(target, r=len(pairs[target.name][0])) for target in targets]
        described = peft_config(lora, targets, config.model.path, **beside.settings)
        return {**beside.files, **_frozen(adapters), **encode_pairs(described, pairs, targets, more)}
    pairs = {}
    for a in adapters:
        # On the host: rank 2r in fp32 is 4 or 8 times the adapters, too much beside a base on a GPU.
        A, B, A0, B0 = (x.detach().cpu().float() for x in (a.A, a.B, *initial[a.target.name]))
        pairs[a.target.name] = (torch.cat([A, A0]), torch.cat([B, -B0], dim=1))
    described = peft_config(lora, targets, config.model.path, times=2, **beside.settings)
    return {**beside.files, **encode_pairs(described, pairs, targets, more)}


def _pair_of(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT has for it: of LoRA-SB ``B R`` is its B, in fp32."""
    A, B = adapter.A.detach(), adapter.B.detach()
    if "lora_R" not in adapter.more:
        return A, B
    A, B, R = (tensor.cpu().float() for tensor in (A, B, adapter.more["lora_R"].detach()))
    return A, B @ R


def _without_pruned(adapters: Sequence[Adapter], lora: LoraConfig) -> Pairs:
    """AdaLoRA's as plain LoRA, in fp32: A and ``B diag(E)`` of the triplets whose E is not 0.

    A layer without any keeps one, of zeros; at the start, where every E is 0, all keep all.  B makes up for the scale
    that PEFT has for so many.
    """
    held = {a.target.name: tuple(t.detach().cpu().float() for t in (a.A, a.B, a.more["lora_E"])) for a in adapters}
    begun, pairs = any(bool(E.any()) for _, _, E in held.values()), {}
    for target in (adapter.target for adapter in adapters):
        A, B, E = held[target.name]
        stay = E != 0 if begun else torch.ones_like(E, dtype=torch.bool)
        stay[0] |= not stay.any()
        by_peft = lora.alpha_of(target.name) / int(stay.sum())
        pairs[target.name] = A[stay], (B * E)[:, stay] * (target.scaling / by_peft)
    return pairs


def _magnitudes(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """DoRA's, by PEFT's names."""
    found = {a.target.name: a.more["lora_magnitude_vector"] for a in adapters if "lora_magnitude_vector" in a.more}
    return {f"{PREFIX}{name}.lora_magnitude_vector": value.detach().cpu() for name, value in found.items()}


def _frozen(adapters: Sequence[Adapter]) -> dict[str, bytes]:
    """LoRA-SB's A and B, which a later start needs apart from R; PEFT does not read this file."""
    held = {a.target.name: (a.A, a.B) for a in adapters if "lora_R" in a.more}
    tensors = {
        f"{name}.lora_{side}": x.detach().cpu() for name, ab in held.items() for side, x in zip("AB", ab, strict=True)
    }
    return {FROZEN: save(tensors)} if tensors else {}


def frozen_pairs(folder: Path, targets: Sequence[Target]) -> Pairs:
    """LoRA-SB's A and B as :func:`encode` wrote them."""
    with safe_open(folder / FROZEN, framework="pt") as reader:
        return {t.name: (reader.get_tensor(f"{t.name}.lora_A"), reader.get_tensor(f"{t.name}.lora_B")) for t in targets}


def encode_pairs(
    description: PeftLoraConfig,
    pairs: Pairs,
    targets: Sequence[Target],
    tables: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, bytes]:
    """The files of a PEFT folder, every shape checked."""
    tensors = dict(tables or {})
    ranks = {"r": description.r, "rank_pattern": description.rank_pattern}
    for target in targets:
        A, B = pairs[target.name]
        r = peft_settings.rank_of(ranks, target.name)
        expected = ((r, target.n), (target.m, r))
        assert (tuple(A.shape), tuple(B.shape)) == expected, f"{target.name}: shapes {A.shape}, {B.shape}, {expected}"
        for side, tensor in (("A", A), ("B", B)):
            tensors[f"{PREFIX}{target.name}.lora_{side}.weight"] = tensor.detach().cpu().contiguous()
    description.inference_mode = True
    # As PEFT's save_pretrained writes it, but its sets come in an order that differs from process to process.
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in description.to_dict().items()}
    return {
        "adapter_config.json": (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


@dataclass(frozen=True)
class Given:
    """What a run begins from in place of a method: pairs, rows of tables by the tables' names, DoRA's magnitudes."""

    pairs: Pairs
    tables: dict[str, torch.Tensor]
    magnitudes: dict[str, torch.Tensor]
    """By target; none of a plain adapter, whose rows keep the norms that they have."""


def read_adapter(folder: Path, config: Config, targets: Sequence[Target], tables: Sequence[Table] = ()) -> Given:
    """Pairs (A (r, n), B (m, r)) of a PEFT folder, fp32, strictly those of the targets.  Not collective.

    And the rows of the run's tables, of all or of none: these begin as without an adapter.

    Raises:
        AdapterError: if rank, scale, layers or shapes differ from the run's, naming each difference; if it holds more
            than pairs, or on another base than the one on disk.
    """
    try:
        described, tensors = peft_format.read(folder)
    except WeightsError as error:
        damaged = f"{peft_format.WEIGHTS} is damaged: {error}. Copy it again."
        raise AdapterError(f"init.adapter = {folder}: {damaged}") from error
    except ConversionError as error:
        raise AdapterError(f"init.adapter = {error}") from error
    changed, (broken, unknown) = peft_settings.changed_base(described), peft_settings.refused(described)
    if changed is not None:
        raise AdapterError(f"init.adapter = {folder}: {changed}")
    known, left, misfits = _tables_of(described, tensors, tables)
    magnitudes = _magnitudes_of(left, targets)
    taken = (*(TABLES if known and not misfits else ()), *(("use_dora",) if magnitudes else ()))
    beyond = unknown + peft_settings.beyond_pairs(described, taken)
    problems = broken + ([] if broken else _other_scale(described, config.lora, targets))
    problems += misfits + [f"{setting} ({MERGE_FIRST})" for setting in beyond]
    pairs, misfits = _pairs_of(left, targets, told=bool(beyond))
    problems += misfits
    if problems:
        shown = listed(problems, 5)
        raise AdapterError(f"init.adapter = {folder}: {shown}. Set lora.* to what the adapter was made with.")
    read = {name: (A.read().float(), B.read().float()) for name, (A, B) in pairs.items()}
    rows, norms = ({name: tensor.read() for name, tensor in held.items()} for held in (known, magnitudes))
    return Given(read, rows, norms)


def _magnitudes_of(left: dict[str, LazyTensor], targets: Sequence[Target]) -> dict[str, LazyTensor]:
    """DoRA's magnitudes, taken out of the tensors that are ``left``, where the run trains such and all are there."""
    names = {f"{PREFIX}{target.name}.lora_magnitude_vector": target for target in targets if target.kind == "dora"}
    fits = [name in left and left[name].shape == (target.m,) for name, target in names.items()]
    return {target.name: left.pop(name) for name, target in names.items()} if all(fits) else {}


def _tables_of(
    described: Mapping[str, Any], tensors: Mapping[str, LazyTensor], tables: Sequence[Table]
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor], list[str]]:
    """The tables' rows by the tables' names, the tensors that are left, and what of them is missing or another."""
    found, left, problems = {}, dict(tensors), []
    for table in tables:
        names = _names(table)
        tensor = next((left.pop(name) for name in names if name in left), None)
        for name in names:
            left.pop(name, None)
        tokens = list(table.new) if table.whole else peft_settings.tokens_of(described, table.modules[0])
        if tensor is None:
            continue
        found[table.name] = tensor
        if tensor.shape != (table.trained, table.width) or tokens != list(table.new):
            problems.append(f"its rows of {table.modules[0]} are others than the {table.trained} that the run trains")
    if found and len(found) < len(tables):
        problems.append(f"it has {', '.join(found)} alone of what the run trains")
    return found, left, problems


def _other_scale(described: Mapping[str, Any], lora: LoraConfig, targets: Sequence[Target]) -> list[str]:
    """In what ranks and scales differ from the run's: by settings for all layers, else by the first layer."""
    problems = []
    for key, wanted in (("r", lora.r), ("lora_alpha", lora.alpha), ("use_rslora", lora.use_rslora)):
        found = described.get(key, False)  # an exported alpha may hold a factor sqrt(2)
        if not (isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-6)):
            problems.append(f"{key} is {described.get(key)}, the run's is {wanted}")
    if described.get("fan_in_fan_out") and not any(target.transposed for target in targets):
        problems.append("fan_in_fan_out is True, the run's layers hold weights (out, in)")
    if problems:
        return problems
    for target in targets:
        r, scaling = (of(described, target.name) for of in (peft_settings.rank_of, peft_settings.scale_of))
        if r != target.r:
            shown, run = f"rank_pattern is {described.get('rank_pattern')}", f"r {r}, the run {target.r}"
        elif not math.isclose(scaling, target.scaling, rel_tol=1e-6):
            shown = f"alpha_pattern is {described.get('alpha_pattern')}"
            run = f"s {scaling:g}, the run {target.scaling:g}"
        else:
            continue
        return [f"{shown}, which gives {target.name} {run}"]
    return []


def _pairs_of(
    tensors: Mapping[str, LazyTensor], targets: Sequence[Target], told: bool
) -> tuple[dict[str, tuple[LazyTensor, LazyTensor]], list[str]]:
    """The targets' pairs, and what is missing, of another shape, or of no target.

    Args:
        told: whether the settings say that there is more than pairs, so that nothing more need be said of it.
    """
    names = {target.name: [f"{PREFIX}{target.name}.lora_{side}.weight" for side in "AB"] for target in targets}
    problems = []
    extra = sorted(tensors.keys() - {name for pair in names.values() for name in pair})
    whole = [name for name in extra if name.startswith(PREFIX) and not peft_format.PARTS.fullmatch(name)]
    if whole and not told:
        problems.append(f"{whole[0]} was saved whole, and cannot be trained on yet ({MERGE_FIRST})")
    elif extra and not told:
        problems.append(f"{len(extra)} of its tensors belong to no target, e.g. {extra[0]}")
    pairs = {}
    for target in targets:
        found = [tensors.get(name) for name in names[target.name]]
        shapes = (target.r, target.n), (target.m, target.r)
        for name, tensor, shape in zip(names[target.name], found, shapes, strict=True):
            if tensor is None:
                problems.append(f"{name} is missing")
            elif tensor.shape != shape:
                problems.append(f"{name} is {tensor.shape}, must be {shape}")
        if found[0] is not None and found[1] is not None:
            pairs[target.name] = (found[0], found[1])
    return pairs, problems


def initial_pairs_of(folder: Path, targets: Sequence[Target]) -> Pairs:
    """A0, B0 as set, from what :func:`encode` wrote for a method that changed the base.  fp32, exact."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as reader:
        A, B = ({t.name: reader.get_tensor(f"{PREFIX}{t.name}.lora_{side}.weight") for t in targets} for side in "AB")
    return {t.name: (A[t.name][t.r :].clone(), -B[t.name][:, t.r :]) for t in targets}
