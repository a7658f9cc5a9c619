"""Megatron-Bridge's own LoRA classes on megatron-core's GPTModel, on CPU ranks.

    python -c "from tests.peers.megatron_bridge import main; main()" IDS.pt TP PP BASE ADAPTER OUT [BASE ...]
    python -m tests.peers.megatron_bridge BASE COMMIT > tests/fixtures/megatron_bridge_lora.json

The first loads converted bases and converted adapters as Bridge does, one pair after the other; rank 0 writes
OUT/logits.pt (PP 1 only), all ranks save the adapter to OUT/saved, and when all have, there is a file OUT/done.  The
second lists the names and whole shapes of the adapters that Bridge puts on a base.  MEGATRON_BRIDGE names a checkout's
src folder; without it the installed package is taken.  Bridge's package imports Transformer Engine and much else that a
CPU cannot install and LoRA on these models does not use: only its peft modules are imported, over stand-ins.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import _rank_utils, dist_checkpointing
from megatron.core.extensions import transformer_engine as core_engine  # before the stand-ins
from megatron.core.models.gpt import GPTModel

from tests.peers import megatron_gpt


def package(name: str, path: Path | None = None) -> types.ModuleType:
    """A module of this name that runs no code of its own."""
    made = types.ModuleType(name)
    made.__path__ = [str(path)] if path else []
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    sys.modules[name] = made
    return made


def bridge_folder() -> Path:
    if "MEGATRON_BRIDGE" in os.environ:
        return Path(os.environ["MEGATRON_BRIDGE"]) / "megatron" / "bridge"
    spec = importlib.util.find_spec("megatron.bridge")
    assert spec is not None, "pip install --no-deps megatron-bridge"
    return Path(str(spec.origin)).parent


@functools.cache
def bridge_classes() -> dict[str, Any]:
    """Bridge's LoRA classes by their full names."""
    folder = bridge_folder()
    sys.modules[core_engine.__name__] = None  # type: ignore[assignment]  # Bridge then knows that there is none
    engine = package("transformer_engine")
    engine.pytorch = package("transformer_engine.pytorch")  # type: ignore[attr-defined]
    engine.pytorch.Linear = engine.pytorch.GroupedLinear = torch.nn.Module
    engine.pytorch.ops = types.SimpleNamespace(Sequential=torch.nn.Sequential)
    package("megatron.bridge", folder)
    for name in ("peft", "utils"):
        package(f"megatron.bridge.{name}", folder / name)
    if not hasattr(_rank_utils, "safe_get_world_size"):  # of a later megatron-core
        _rank_utils.safe_get_world_size = lambda: dist.get_world_size()
    package("megatron.bridge.utils.common_utils").print_rank_0 = print  # type: ignore[attr-defined]
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.lora import LoRA

    sys.modules[core_engine.__name__] = core_engine
    return {f"{c.__module__}.{c.__name__}": c for c in (CanonicalLoRA, LoRA)}


def adapted(gpt: GPTModel, run_config: dict[str, Any]) -> Any:
    """The model with adapters on it, as a run_config.yaml says."""
    options = dict(run_config["peft"])
    return bridge_classes()[options.pop("_target_")](**options)(gpt, training=False)


def sharded_adapters(model: Any, metadata: Any) -> dict[str, Any]:
    """As Bridge's apply_peft_adapter_filter_to_state_dict."""
    sharded = model.sharded_state_dict(metadata=metadata)
    return {name: t for name, t in sharded.items() if ".adapter." in name and "_extra_state" not in name}


def check(base: str, adapter: str, out: str, ids: torch.Tensor, tp: int, pp: int) -> None:
    gpt, metadata = megatron_gpt.load(base, tp, pp)
    run_config = yaml.safe_load((Path(adapter) / "run_config.yaml").read_text())
    model = adapted(gpt, run_config)
    wanted = sharded_adapters(model, metadata)
    loaded = dist_checkpointing.load(wanted, adapter)
    done = model.load_state_dict({name: value for name, value in loaded.items() if name in wanted}, strict=False)
    assert not done.unexpected_keys, done.unexpected_keys
    assert not [name for name in done.missing_keys if ".adapter." in name], done.missing_keys
    megatron_gpt.compute(model, ids, out)
    megatron_gpt.save(sharded_adapters(model, metadata), out)
    if dist.get_rank() == 0:
        (Path(out) / "saved" / "run_config.yaml").write_text(yaml.safe_dump(run_config))


def main() -> None:
    megatron_gpt.run(check, 3)


def shape_of(sharded: Any) -> list[int]:
    """Of a tensor in the model on one rank: whole, without the axis that layers are stacked along."""
    return list(sharded.data.shape)


def listed(base: str, commit: str) -> dict[str, Any]:
    """Names and shapes of the adapters of both classes on every linear layer, at rank 8."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    megatron_gpt.start(1, 1)
    found: dict[str, Any] = {"source": "NVIDIA-NeMo/Megatron-Bridge", "commit": commit, "dim": 8}
    for name, bridge_class in bridge_classes().items():
        gpt, metadata = megatron_gpt.load(base, 1, 1)
        sharded = sharded_adapters(bridge_class(dim=8)(gpt, training=False), metadata)
        found[name] = {key: shape_of(t) for key, t in sharded.items()}
    return found


if __name__ == "__main__":
    print(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(listed(*sys.argv[1:]), indent=1)))
    dist.destroy_process_group()
