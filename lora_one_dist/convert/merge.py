"""An adapter merged into its base, tensor by tensor.

In: a Hugging Face model's folder and a PEFT folder.  Out: the same files with ``W + scale * B A`` in place of ``W``,
added in fp32 and rounded once to the type of the base.  Peak memory for each worker: one tensor in fp32, its delta in
fp32 and one layer's A and B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.adapters import peft_format
from lora_one_dist.adapters.peft_format import Adapter, Layer
from lora_one_dist.convert import files
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, listed, read_json

HEAD = "lm_head"
EMBEDDINGS = tuple(name for name in peft_format.EMBEDDINGS if name != HEAD)

Shards = dict[str, dict[str, LazyTensor]]


@dataclass(frozen=True)
class Plan:
    """What a merge will write, and what its user should know."""

    base: Path
    shards: Shards
    config: dict[str, Any]
    """Content of config.json."""
    notes: list[str]


def plan(base: Path, adapter: Path, device: torch.device | str = "cpu") -> Plan:
    """Put every tensor of the adapter in its place in the base.  Reads no values.

    Args:
        device: where products and sums are taken.

    Raises:
        ConversionError: if the adapter is of another model, or incomplete; naming the layers.
    """
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise ConversionError(f"{base}: is quantised. Merge into the unquantised model, and quantise what comes out.")
    shards = files.model_shards(base)
    opened = peft_format.open_folder(adapter)
    notes = [f"{len(opened.layers)} layers of rank {_ranks(opened)} are added"]
    opened = _under_names_of(shards, opened, notes)
    if opened.replaced:
        notes.append(f"replaced whole: {', '.join(sorted(opened.replaced))}")
    shards, config = _untie(shards, config, opened, notes)
    _refuse_other_model(base, shards, opened)
    merged = {
        file: {name: _merged(name, tensor, opened, device) for name, tensor in tensors.items()}
        for file, tensors in shards.items()
    }
    return Plan(base, merged, config, notes)


def run(planned: Plan, out: Path, workers: int = 1) -> None:
    """Write the merged model: a new folder, whole or not there."""
    with files.new_folder(out, files.num_bytes(planned.shards)) as partial:
        files.copy_rest(planned.base, partial)
        (partial / "config.json").write_text(json.dumps(planned.config, indent=2) + "\n", encoding="utf-8")
        files.write_model(partial, planned.shards, workers)


def merged_weight(weight: torch.Tensor, layer: Layer, transposed: bool, device: torch.device | str) -> torch.Tensor:
    """``W + scale * B A``, or DoRA's ``m (W + scale * B A) / ||W + scale * B A||`` by rows (arXiv 2402.09353, eq. 5).

    Args:
        weight: (m, n), or (n, m) if transposed; is overwritten if it is fp32 on ``device``.
        transposed: the weight is stored as (n, m), as Conv1D and embeddings do.

    Returns:
        the sum in fp32 (fp64 for an fp64 weight), rounded once to the type of ``weight``, on the host.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    dtype, total = weight.dtype, weight.to(device, exact)
    del weight
    delta = layer.B.read().to(device, exact) @ layer.A.read().to(device, exact)
    total += (delta.T if transposed else delta).mul_(layer.scale)
    del delta
    if layer.magnitude is not None:
        rows = total.T if transposed else total  # a view: out_features first
        rows *= (layer.magnitude.read().to(device, exact) / torch.linalg.norm(rows, dim=1)).view(-1, 1)
    return total.to(dtype).cpu()


def _merged(name: str, base: LazyTensor, adapter: Adapter, device: torch.device | str) -> LazyTensor:
    """A tensor of the base as it is after the merge."""
    replacement = adapter.replaced.get(name)
    weight = base if replacement is None else _cast(replacement, base.dtype)
    layer = adapter.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if layer is None:
        return weight
    transposed = _transposed(weight.shape, layer, adapter)
    return LazyTensor(base.dtype, base.shape, lambda: merged_weight(weight.read(), layer, bool(transposed), device))


def _cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(dtype, tensor.shape, lambda: tensor.read().to(dtype))


def _transposed(shape: tuple[int, ...], layer: Layer, adapter: Adapter) -> bool | None:
    """Is a weight of this shape stored as (n, m)?  None if the layer fits it neither way."""
    m, n = layer.B.shape[0], layer.A.shape[1]
    fits = {False: shape == (m, n), True: shape == (n, m)}
    if layer.embedding:
        return True if fits[True] else None
    if m == n and fits[True]:
        return bool(adapter.config.get("fan_in_fan_out"))
    return next((transposed for transposed, fit in fits.items() if fit), None)


def _ranks(adapter: Adapter) -> str:
    return ", ".join(map(str, sorted({layer.r for layer in adapter.layers.values()}))) or "none"


def _under_names_of(shards: Shards, adapter: Adapter, notes: list[str]) -> Adapter:
    """The adapter under the base's names, where the base was saved without its first part (``transformer.``)."""
    held = {name for tensors in shards.values() for name in tensors}
    wanted = [f"{name}.weight" for name in adapter.layers] + list(adapter.replaced)
    heads = {name.partition(".")[0] for name in wanted if not name.startswith(f"{HEAD}.")}
    if len(heads) != 1 or any(name in held for name in wanted if not name.startswith(f"{HEAD}.")):
        return adapter
    prefix = f"{heads.pop()}."
    if any(name.startswith(prefix) for name in held) or not any(name.removeprefix(prefix) in held for name in wanted):
        return adapter
    notes.append(f"the base's names lack the leading {prefix}, which is taken off the adapter's")
    layers = {name.removeprefix(prefix): layer for name, layer in adapter.layers.items()}
    replaced = {name.removeprefix(prefix): tensor for name, tensor in adapter.replaced.items()}
    return Adapter(adapter.where, adapter.config, layers, replaced)


def _untie(shards: Shards, config: dict[str, Any], adapter: Adapter, notes: list[str]) -> tuple[Shards, dict[str, Any]]:
    """Give input and output embeddings a tensor each, if they share one and the adapter changes only one of them."""
    held = {name: file for file, tensors in shards.items() for name in tensors}
    embedding = next((name for name in held if name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS), None)
    head = f"{HEAD}.weight"
    tied = embedding is not None and (head not in held or config.get("tie_word_embeddings") is True)
    touched = {f"{name}.weight" for name in adapter.layers} | adapter.replaced.keys()
    if not tied or embedding is None or not {embedding, head} & touched:
        return shards, config
    if adapter.config.get("ensure_weight_tying"):
        if {embedding, head} & {f"{name}.weight" for name in adapter.layers}:
            raise ConversionError(
                f"{adapter.where}: ensure_weight_tying with LoRA on a tied embedding is not supported. Merge it with "
                "PEFT."
            )
        whole = adapter.replaced.pop(head, None)
        if whole is not None:
            adapter.replaced.setdefault(embedding, whole)
        notes.append(f"{embedding} and {head} stay one tensor")
        return shards, config
    notes.append(f"{embedding} and {head} shared a tensor; as the adapter tells them apart, each has its own now")
    file = held[embedding]
    shards = {name: dict(tensors) for name, tensors in shards.items()}
    shards[held.get(head, file)].pop(head, None)
    shards[file][head] = shards[file][embedding]
    return shards, {**config, "tie_word_embeddings": False}


def _refuse_other_model(base: Path, shards: Shards, adapter: Adapter) -> None:
    """Raise ConversionError unless every layer finds its weight, and every targeted weight its layer."""
    held = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    problems = []
    for name, layer in adapter.layers.items():
        weight = held.get(f"{name}.weight")
        if weight is None:
            problems.append(f"it has no {name}.weight")
        elif _transposed(weight.shape, layer, adapter) is None:
            problems.append(
                f"{name}.weight is {weight.shape}, the adapter's B A {(layer.B.shape[0], layer.A.shape[1])}"
            )
        elif layer.magnitude is not None and layer.magnitude.shape != (layer.B.shape[0],):
            problems.append(f"the magnitudes of {name} are {layer.magnitude.shape}, must be {(layer.B.shape[0],)}")
    for name, tensor in adapter.replaced.items():
        if name not in held:
            problems.append(f"it has no {name}")
        elif held[name].shape != tensor.shape:
            problems.append(f"{name} is {held[name].shape}, the adapter's {tensor.shape} (resize the base first)")
    if not problems:
        problems = [f"the adapter targets {name} and holds nothing for it" for name in _left_out(held, adapter)]
    if problems:
        raise ConversionError(
            f"{base}: is not the base of {adapter.where}: {listed(problems)}. Give the base it was trained on "
            f"({adapter.config.get('base_model_name_or_path')})."
        )


def _left_out(held: Mapping[str, LazyTensor], adapter: Adapter) -> list[str]:
    """Weights that ``target_modules`` names and the adapter lacks: it was not saved whole."""
    config = adapter.config
    partly = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    if partly or config.get("target_modules") in (None, "all-linear") or not adapter.layers:
        return []
    names = [name.removesuffix(".weight") for name, tensor in held.items() if len(tensor.shape) == 2]
    return [name for name in names if name not in adapter.layers and peft_format.is_target(config, name)]
