"""Models to be planned and loaded: their folders whole, changed and as pickles, and what is asked of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lora_one_dist.base import loading
from lora_one_dist.config.settings import LoraConfig, ModelConfig
from lora_one_dist.disk import weights


def gpt2(**changes):
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **changes))


def ids() -> torch.Tensor:
    return torch.arange(3, 43).view(2, 20)


def plan(folder: Path, **lora):
    return loading.plan(folder, ModelConfig(path=str(folder), dtype="fp32"), LoraConfig(**{"r": 4, **lora}), 0)


def changed(folder: Path, tmp_path: Path, tensors=None, **config) -> Path:
    """A copy in one file: its tensors by a function of them, config.json with other values."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, copy)
    held = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    save_file(tensors(held) if tensors else held, copy / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**described, **config}))
    return copy


def stored(parts: list[weights.Part]) -> torch.Tensor:
    """The values of a tensor, flat."""
    return torch.cat([_stored(part) for part in parts])


def _stored(part: weights.Part) -> torch.Tensor:
    source = part.source
    raw = bytearray(source.path.read_bytes()[source.offset : source.offset + source.num_bytes])
    return torch.frombuffer(raw, dtype=source.dtype)[part.start : part.start + part.count]


def rename(held):
    return {name.removeprefix("model."): tensor for name, tensor in held.items()}


class Malicious:
    """What a pickle may hold: a call of anything."""

    def __reduce__(self):
        return Path.touch, (Path("run_by_the_pickle"),)


def pickled(folder: Path, tmp_path: Path, shards: int = 1, **more) -> Path:
    """A copy of a model with its weights in pytorch_model*.bin."""
    copy = shutil.copytree(folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*safetensors*"))
    held = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()} | more
    if shards == 1:
        torch.save(held, copy / "pytorch_model.bin")
        return copy
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(held)}
    for shard in set(weight_map.values()):
        torch.save({name: held[name] for name in held if weight_map[name] == shard}, copy / shard)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return copy


def plan_of_pickle(folder: Path, allowed: bool = True) -> loading.Plan:
    settings = ModelConfig(path=str(folder), dtype="fp32", allow_pickle=allowed)
    return loading.plan(folder, settings, LoraConfig(r=4), 0)
