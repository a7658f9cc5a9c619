"""Adapters on disk, as PEFT folders.

In: adapters (the same on every rank).  Out: ``adapter_config.json`` and ``adapter_model.safetensors`` that
``PeftModel.from_pretrained`` loads on the untouched base, as bytes or as a folder.  Nothing here is collective.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_one_dist.adapters.lora import Adapter, peft_config
from lora_one_dist.base.targets import Target
from lora_one_dist.config.settings import Config
from lora_one_dist.disk import folders
from lora_one_dist.initialise.pairs import Pairs

PREFIX = "base_model.model."  # of every name in a PEFT checkpoint


class AdapterError(ValueError):
    """A PEFT folder that does not fit the run: value, rule, remedy."""


def export(
    folder: Path, config: Config, adapters: Sequence[Adapter], targets: Sequence[Target], initial: Pairs | None
) -> None:
    """Write the adapters as they are now, in place of an older folder of that name.  Call on one rank.

    Args:
        initial: as in :func:`encode`.
    """
    folders.replace(folder, encode(config, adapters, targets, initial))


def encode(
    config: Config, adapters: Sequence[Adapter], targets: Sequence[Target], initial: Pairs | None
) -> dict[str, bytes]:
    """The files of a PEFT folder, by name, with the adapters as they are now.

    Args:
        initial: A0, B0 as set, for methods that changed the base: the export then has rank 2r and fp32,
            ``lora_A = [A; A0]``, ``lora_B = [B | -B0]``, and the same scale s, so that it holds on the untouched base:
            ``W + s (B A - B0 A0)``.  None for methods that did not.
    """
    lora = config.lora
    if initial is None:
        pairs = {a.target.name: (a.A.detach(), a.B.detach()) for a in adapters}
        return encode_pairs(peft_config(lora, targets, config.model.path), pairs, targets)
    pairs = {}
    for a in adapters:
        # On the host: rank 2r in fp32 is 4 or 8 times the adapters, too much beside a base on a GPU.
        A, B, A0, B0 = (x.detach().cpu().float() for x in (a.A, a.B, *initial[a.target.name]))
        pairs[a.target.name] = (torch.cat([A, A0]), torch.cat([B, -B0], dim=1))
    # s must stay: alpha / r is kept by doubling alpha with r, alpha / sqrt(r) by sqrt(2).
    alpha = lora.alpha * (math.sqrt(2) if lora.use_rslora else 2)
    return encode_pairs(peft_config(lora, targets, config.model.path, r=2 * lora.r, lora_alpha=alpha), pairs, targets)


def encode_pairs(description: PeftLoraConfig, pairs: Pairs, targets: Sequence[Target]) -> dict[str, bytes]:
    """The files of a PEFT folder, every shape checked."""
    tensors = {}
    for target in targets:
        A, B = pairs[target.name]
        expected = ((description.r, target.n), (target.m, description.r))
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


def read_adapter(folder: Path, config: Config, targets: Sequence[Target]) -> Pairs:
    """Pairs (A (r, n), B (m, r)) of a PEFT folder, fp32, strictly those of the targets.  Not collective.

    Raises:
        AdapterError: if rank, scale, layers or shapes differ from the run's, naming each difference.
    """
    try:
        described = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(
            f"init.adapter = {folder}: its adapter_config.json cannot be read: {error}. Copy it again."
        ) from error
    lora = config.lora
    problems = []
    for key, wanted in (("r", lora.r), ("lora_alpha", lora.alpha), ("use_rslora", lora.use_rslora)):
        found = described.get(key, False)  # an exported alpha may hold a factor sqrt(2)
        if not (isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-6)):
            problems.append(f"{key} is {described.get(key)}, the run's is {wanted}")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if described.get(key):
            problems.append(f"{key} is {described[key]}, which is not supported")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise AdapterError(f"init.adapter = {folder}: holds no adapter_model.safetensors. Save it as such.")
    try:
        with safe_open(path, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name).float() for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"init.adapter = {folder}: {path.name} is damaged: {error}. Copy it again.") from error
    known = {f"{PREFIX}{target.name}.lora_{side}.weight" for target in targets for side in "AB"}
    extra = sorted(set(tensors) - known)
    if extra:
        problems.append(f"{len(extra)} of its tensors belong to no target, e.g. {extra[0]}")
    pairs = {}
    for target in targets:
        names = [f"{PREFIX}{target.name}.lora_{side}.weight" for side in "AB"]
        found = [tensors.get(name) for name in names]
        wanted_shapes = [(lora.r, target.n), (target.m, lora.r)]
        for name, tensor, shape in zip(names, found, wanted_shapes, strict=True):
            if tensor is None:
                problems.append(f"{name} is missing")
            elif tuple(tensor.shape) != shape:
                problems.append(f"{name} is {tuple(tensor.shape)}, must be {shape}")
        if found[0] is not None and found[1] is not None:
            pairs[target.name] = (found[0], found[1])
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise AdapterError(f"init.adapter = {folder}: {shown}. Set lora.* to what the adapter was made with.")
    return pairs


def initial_pairs_of(folder: Path, r: int, targets: Sequence[Target]) -> Pairs:
    """A0, B0 as set, from what :func:`encode` wrote for a method that changed the base.  fp32, exact."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as reader:
        names = {t.name: [f"{PREFIX}{t.name}.lora_{side}.weight" for side in "AB"] for t in targets}
        return {
            name: (reader.get_tensor(A)[r:].clone(), -reader.get_tensor(B)[:, r:]) for name, (A, B) in names.items()
        }
