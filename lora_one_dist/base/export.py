"""A trained model as transformers' ``from_pretrained`` reads it: config.json, safetensors, tokenizer.

In: a base, whole on each rank or partitioned, and the folder that it was loaded from.  Out: each rank's files, which
together are the folder.  A rank writes whole tensors, as many bytes as the others; beside these one tensor at a time is
whole on it: ``e P / R`` bytes of host memory, and e times the largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_one_dist.base.sharding import Base
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.sources import renamed
from lora_one_dist.base.targets import refuse_experts
from lora_one_dist.cluster import comm, ownership
from lora_one_dist.config.settings import ModelConfig
from lora_one_dist.disk import lazy
from lora_one_dist.disk.folders import Content
from lora_one_dist.disk.weights import beside_weights

NAMES = {"bf16": "bfloat16", "fp32": "float32"}  # of types, in config.json


def refuse_untrainable(skeleton: Any, config: ModelConfig) -> None:
    """Raise ModelError for a model of which not all can be trained, or be written as one of its kind.  Pure."""
    refuse_experts(skeleton)
    fault = None
    if skeleton.towers_dropped:
        fault = f"{skeleton.towers_dropped[0].rstrip('.')} is left out of what is trained, so the model would lack it"
    elif others := renamed(skeleton):
        fault = f"its files have another name for {others[0]}, and are not written under theirs"
    if fault is not None:
        raise ModelError(
            f"train.mode = full: {type(skeleton).__name__} of {config.path} cannot be written: {fault}. Train adapters "
            "(train.mode: lora), or a language model by itself."
        )


def beside(folder: Path, dtype: str) -> dict[str, bytes]:
    """What stands beside the weights of a model that was loaded from a folder, with values of a type now."""
    found = {name: path.read_bytes() for name, path in beside_weights(folder).items()}
    found |= {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}  # code that comes with the model
    described = json.loads(found["config.json"])
    for key in ("torch_dtype", "quantization_config"):
        described.pop(key, None)
    described["dtype"] = NAMES[dtype]
    return {**found, "config.json": (json.dumps(described, indent=2) + "\n").encode()}


def encode(base: Base, beside: Mapping[str, bytes]) -> dict[str, Content]:
    """This rank's files of the folder, by name, with the weights as they are now.  Collective.

    Args:
        beside: from :func:`beside`.
    """
    base.release_all()
    named = _tensors(base.module)
    sizes = [float(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()) for _, tensor in named]
    owners = ownership.assign(sizes, comm.world_size())
    writers = sorted(set(owners))
    files = {rank: _file_name(i, len(writers)) for i, rank in enumerate(writers)}
    own: dict[str, torch.Tensor] = {}
    for (name, tensor), owner in zip(named, owners, strict=True):
        with base.gathered([tensor] if isinstance(tensor, torch.nn.Parameter) else []):
            if owner == comm.rank():
                own[name] = tensor.detach().cpu().contiguous()  # keeps what was gathered
    found: dict[str, Content] = {}
    if own:
        found[files[comm.rank()]] = partial(lazy.pieces, lazy.held(own))
    if comm.rank() != 0:
        return found
    if len(writers) > 1:
        where = {name: files[owner] for (name, _), owner in zip(named, owners, strict=True)}
        index = {"metadata": {"total_size": int(sum(sizes))}, "weight_map": dict(sorted(where.items()))}
        found["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    return {**beside, **found}


def _tensors(module: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, and the buffers that a state dict has."""
    kept = module.state_dict().keys()
    return [*module.named_parameters(), *((name, held) for name, held in module.named_buffers() if name in kept)]


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
