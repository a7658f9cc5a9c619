"""The frozen base: planned without a weight read, then loaded to where the ZeRO JSON says.

In: the ``model``, ``lora`` and ``deepspeed`` groups of a config.  Out: a :class:`Plan`, then a
:class:`~lora_one_dist.base.sharding.Base`.  Everything that can be refused is refused by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lora_one_dist.base import sharding
from lora_one_dist.base.files import refuse_missing, refuse_unfit, weight_files
from lora_one_dist.base.graph import begin_at_embeddings
from lora_one_dist.base.products import freeze_products, train_products
from lora_one_dist.base.recompute import blocks_asked, most_blocks, recompute_blocks
from lora_one_dist.base.rehearsal import rehearse
from lora_one_dist.base.skeleton import DTYPES, ModelError, attention, build_skeleton, fp8_block
from lora_one_dist.base.sources import NotSliceableError, find_sources
from lora_one_dist.base.targets import Target, choose
from lora_one_dist.base.towers import drop_towers, model_class
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
    sources: dict[str, list[weights.Part]] | None
    """Where each tensor's values lie, or None where ``from_pretrained`` must make them."""
    notes: tuple[str, ...] = ()
    """What the user should be told: what was chosen for the model, and what could not be checked."""
    not_sliced: str = ""
    """Why ``from_pretrained`` must."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Linear layers that all-linear leaves out besides the head: why, by name."""


def plan(
    folder: Path, config: ModelConfig, lora: LoraConfig | None, rank_needed: int, changes_base: bool = False
) -> Plan:
    """Read config.json and the tensor names, and refuse what cannot work.  Reads no weights.  Not collective.

    Args:
        folder: from :func:`local_folder`.
        lora: None: there are no targets, every weight is trained.
        rank_needed: singular vectors that the initialisation takes from each target.
        changes_base: does it change the weights of targets?

    Raises:
        ModelError: naming value, rule and remedy.
    """
    skeleton = build_skeleton(config, folder)
    targets, left_out = choose(skeleton, lora, rank_needed, changes_base) if lora is not None else ([], {})
    unchecked = rehearse(skeleton, config)
    files, block = weight_files(folder, config.allow_pickle), fp8_block(folder, config.path)
    blocks_asked(config.recompute, most_blocks(skeleton))
    try:
        if files[0].suffix == ".bin":
            raise NotSliceableError("pickles are read whole")
        found = find_sources(files, skeleton, block)
    except NotSliceableError as error:
        if block is not None:
            remedy = "Fetch it again, or give the unquantised model"
            raise ModelError(f"model.path = {config.path}: its 8-bit floats do not fit: {error}. {remedy}.") from error
        refuse_unfit(config, skeleton, files)
        notes = notes_on(skeleton, config, unchecked)
        return Plan(folder, skeleton, targets, None, notes, str(error), left_out)
    notes = notes_on(skeleton, config, unchecked, found.ignored)
    return Plan(folder, skeleton, targets, found.parts, notes, left_out=left_out)


def notes_on(skeleton: Any, config: ModelConfig, unchecked: str | None, ignored: Sequence[str] = ()) -> tuple[str, ...]:
    """What is to be told of a model's plan.  Pure."""
    found, chosen = [unchecked] if unchecked else [], skeleton.config._attn_implementation
    if config.attn_implementation == "auto" and chosen != "sdpa":
        found.append(f"{type(skeleton).__name__} has no sdpa attention in transformers: {chosen} is taken")
    if ignored:
        found.append(f"{len(ignored)} tensors of the base's files are not the model's, e.g. {ignored[0]}: not read")
    return tuple(found)


def check_loadable(planned: Plan, shard_group: str) -> None:
    """Raise ModelError if the base cannot be sharded inside each host, as the config asks.  Pure."""
    if planned.sources is None and shard_group == "node":
        raise ModelError(
            f"deepspeed.shard_group = node: needs tensors that can be read by slices, but of {planned.folder} "
            f"{planned.not_sliced}, and from_pretrained reads on global rank 0 only. Use shard_group: world, or save "
            "the model again with save_pretrained."
        )


def load(
    config: ModelConfig,
    deepspeed: DeepSpeedConfig,
    planned: Plan,
    micro_batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    trained: bool = False,
) -> sharding.Base:
    """Load the base: by slices, or where that cannot be by ``from_pretrained``.  Collective.

    Args:
        trained: are its weights trained?  Else they are frozen.
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
        base = sharding.load_pretrained(lambda: _from_pretrained(config, planned, ds_config is None), ds_config)
    base.module.config.use_cache = False
    if trained:
        train_products(base.module)
    else:
        freeze_products(base.module)
    count = blocks_asked(config.recompute, most_blocks(base.module))
    recompute_blocks(base.module, count, reentrant=config.checkpointing == "reentrant")
    begin_at_embeddings(base.module)
    return base


def is_partitioned(deepspeed: DeepSpeedConfig) -> bool:
    """Does ZeRO-3 partition or offload the base?  Not collective.

    Where no rank shares it with another, each holds it whole, without hooks around its layers: these and what they copy
    took a sixth of an initialisation.
    """
    if deepspeed.stage != 3:
        return False
    return comm.num_sharers(deepspeed.shard_group) > 1 or deepspeed.offloads


def _from_pretrained(config: ModelConfig, planned: Plan, whole: bool) -> nn.Module:
    folder = planned.folder
    loaded: Any = model_class(planned.skeleton.config).from_pretrained(
        folder,
        dtype=DTYPES[config.dtype],
        attn_implementation=attention(config),
        trust_remote_code=config.trust_remote_code,
        use_safetensors=weight_files(folder, config.allow_pickle)[0].suffix == ".safetensors",
        weights_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    refuse_missing(config, report)
    drop_towers(model)
    return model.to(comm.device()) if whole else model
