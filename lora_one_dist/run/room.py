"""How much disk a run's checkpoints take.  Not collective."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_one_dist.base.tables import Table
from lora_one_dist.base.targets import Target
from lora_one_dist.config.settings import Config
from lora_one_dist.run import checkpoint

BYTES = {"fp32": 4, "bf16": 2}  # of an element
ROOM = 2  # checkpoints that must fit on the disk: the newest stays until the next is whole


def refuse_full_disk(root: Path, config: Config, targets: Sequence[Target | Table], parameters: int) -> None:
    """Raise checkpoint.CheckpointError if ROOM checkpoints do not fit on the disk.  Not collective.

    Args:
        parameters: of the model.
    """
    more = 1 if checkpoint.saved_steps(root / "checkpoints") else ROOM
    full = config.train.mode == "full"
    size = size_of_full(config, parameters) if full else size_bytes(config, targets)
    result = parameters * BYTES[config.model.dtype] if full else 0  # the model once more, at the end
    needed, free = more * size + result, shutil.disk_usage(checkpoint.existing(root)).free
    if needed > free:
        raise checkpoint.CheckpointError(
            f"output_dir = {root}: {free / 2**20:.1f} MiB are free, {ROOM} checkpoints must fit: {more} more take "
            f"{needed / 2**20:.1f} MiB. Make room, give another folder{'' if full else ', or lower lora.r'}."
        )


def size_of_full(config: Config, parameters: int) -> int:
    """Bytes of one checkpoint where every weight is trained.  Pure."""
    return parameters * ((12 if config.optim.name == "adamw" else 4) + BYTES[config.model.dtype])


def size_bytes(config: Config, trained: Sequence[Target | Table]) -> int:
    """Bytes of one checkpoint, but for some kB of text.  Pure."""
    working, states = BYTES[config.model.dtype], 12 if config.optim.name == "adamw" else 4
    tables = sum(one.size * (states + one.names * working) for one in trained if isinstance(one, Table))
    targets = [one for one in trained if isinstance(one, Target)]
    averages = 8 if config.lora.kind == "adalora" else 0
    frozen = sum(one.pair for one in targets) if config.lora.kind == "lora_sb" else 0
    weights = 8 * sum(one.m * one.n for one in targets) if config.optim.moments_of_weights else 0
    exported = 8 if config.changes_base else 4 if averages else working
    kept = (4 if weights else states) + averages + exported
    return tables + sum(one.adapter for one in targets) * kept + frozen * (4 + working) + weights
