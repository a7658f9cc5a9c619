"""The frozen base: planned without a weight read, then loaded to where the ZeRO JSON says.

In: the ``model``, ``lora`` and ``deepspeed`` groups of a config.  Out: a :class:`Plan`, then a
:class:`~lora_one_dist.base.sharding.Base`.  Everything that can be refused is refused by the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from lora_one_dist.base import sharding
from lora_one_dist.base.files import refuse_missing, refuse_unfit, tensor_sources, weight_files
from lora_one_dist.base.products import freeze_products
from lora_one_dist.base.recompute import blocks_asked, most_blocks, recompute_blocks
from lora_one_dist.base.skeleton import DTYPES, ModelError, build_skeleton
from lora_one_dist.base.targets import Target, choose
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import DeepSpeedConfig, LoraConfig, ModelConfig
from lora_one_dist.disk import weights


@dataclass(frozen=True)
class Plan:
    """What is known of a model before a weight is read."""

    folder: Path
    skeleton: Any
    """transformers model with parameters on the meta device."""
    targets: list[Target]
    sources: dict[str, weights.TensorSource] | None
    """Where each tensor's values lie, or None where names do not map one to one."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Linear layers that all-linear leaves out besides the head: why, by name."""


def plan(folder: Path, config: ModelConfig, lora: LoraConfig, rank_needed: int) -> Plan:
    """Read config.json and the tensor names, and refuse what cannot work.  Reads no weights.  Not collective.

    Args:
        folder: from :func:`local_folder`.
        rank_needed: singular vectors that the initialisation takes from each target.

    Raises:
        ModelError: naming value, rule and remedy.
    """
    skeleton = build_skeleton(config, folder)
    targets, left_out = choose(skeleton, lora, rank_needed)
    files = weight_files(folder, config.allow_pickle)
    blocks_asked(config.recompute, most_blocks(skeleton))
    sources = None if files[0].suffix == ".bin" else tensor_sources(files, skeleton)
    if sources is None:
        refuse_unfit(config, skeleton, files)
    return Plan(folder, skeleton, targets, sources, left_out)


def check_loadable(planned: Plan, shard_group: str) -> None:
    """Raise ModelError if the base cannot be sharded inside each host, as the config asks.  Pure."""
    if planned.sources is None and shard_group == "node":
        raise ModelError(
            "deepspeed.shard_group = node: needs tensors that can be read one by one, but the names or shapes in "
            f"{planned.folder} do not match the model's one to one (fused or renamed weights), and from_pretrained "
            "reads on global rank 0 only. Use shard_group: world, or save the model under its own names."
        )


def load(
    config: ModelConfig,
    deepspeed: DeepSpeedConfig,
    planned: Plan,
    micro_batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> sharding.Base:
    """Load the frozen base: by slices where names map one to one, else by ``from_pretrained``.  Collective.

    Args:
        progress: told how many tensors of how many are done.
    """
    ds_config = None
    if is_partitioned(deepspeed):
        sharding.start_deepspeed()
        ds_config = sharding.deepspeed_config(deepspeed.policy(), config.dtype, micro_batch_size)
    if planned.sources is not None:
        group = deepspeed.shard_group
        base = sharding.load_slices(planned.skeleton, planned.sources, comm.device(), ds_config, group, progress)
    else:
        base = sharding.load_pretrained(lambda: _from_pretrained(config, planned.folder, ds_config is None), ds_config)
    base.module.config.use_cache = False
    freeze_products(base.module)
    count = blocks_asked(config.recompute, most_blocks(base.module))
    recompute_blocks(base.module, count, reentrant=config.checkpointing == "reentrant")
    base.module.enable_input_require_grads()  # every weight is frozen: the graph must start somewhere
    return base


def is_partitioned(deepspeed: DeepSpeedConfig) -> bool:
    """Does ZeRO-3 partition or offload the base?  Not collective.

    Where no rank shares it with another, each holds it whole, without hooks around its layers: these and what they copy
    took a sixth of an initialisation.
    """
    if deepspeed.stage != 3:
        return False
    return comm.num_sharers(deepspeed.shard_group) > 1 or deepspeed.offloads


def _from_pretrained(config: ModelConfig, folder: Path, whole: bool) -> nn.Module:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[config.dtype],
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=weight_files(folder, config.allow_pickle)[0].suffix == ".safetensors",
        weights_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    refuse_missing(config, report)
    return model.to(comm.device()) if whole else model
