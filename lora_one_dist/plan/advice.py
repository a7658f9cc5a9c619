"""Settings that make a run fit where it does not, and settings that make it faster and still fit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from lora_one_dist.config.settings import Config
from lora_one_dist.plan.memory import host_bytes, memory_by_phase
from lora_one_dist.plan.prediction import predict
from lora_one_dist.plan.shape import Cluster, Shape

NEARLY = 1.02  # times the least peak that a setting can reach: good enough, where it costs less
WORTH = 1.03  # times the tokens a second from which on a setting is named
PARTITION, OFFLOAD = "ds_configs/zero3.json", "ds_configs/zero3_offload.json"  # of a checkout, where runs start
REPLICATE = "ds_configs/stage0.json"
Change = tuple[str, dict[str, Any]]  # group of the config, and settings in it


def advice(shape: Shape, config: Config, cluster: Cluster) -> list[str]:
    """For each phase that does not fit into ``cluster.bytes_per_rank``: settings that make it, alone or together."""
    limit, found = cluster.bytes_per_rank, []
    for phase, terms in memory_by_phase(shape, config, cluster).items():
        peak = sum(terms.values())
        if peak <= limit:
            continue
        start = f"{phase} needs {peak / 1e9:.1f} GB, {limit / 1e9:.0f} GB are there"
        alone = _alone(shape, config, cluster, phase)
        if alone:
            texts = [_text(change) + _in_host_memory(shape, _with(config, [change]), cluster) for change in alone]
            found.append(f"{start}. One of these is enough: " + "; ".join(texts) + ".")
            continue
        chosen, least = _together(shape, config, cluster, phase)
        settings = " ".join(map(_text, chosen)) + _in_host_memory(shape, _with(config, chosen), cluster)
        if least <= limit:
            found.append(f"{start}. Together enough: {settings}.")
        else:
            most = f" ({least / 1e9:.1f} GB with {settings})" if chosen else ""
            found.append(f"{start}. No setting is enough{most}; give it more GPUs.")
    return found


def faster(shape: Shape, config: Config, cluster: Cluster) -> list[str]:
    """Settings that fit and that the plan's seconds favour, each alone, the best first: ``setting (1.30 x)``."""
    size, most = config.train.micro_batch_size, config.train.global_batch_size // cluster.ranks
    changes: list[Change] = [("model", {"recompute": "auto"})] if config.model.recompute != "auto" else []
    if config.deepspeed.stage == 3 and os.path.isfile(REPLICATE):
        node = {"shard_group": "world"} if config.deepspeed.shard_group == "node" else {}
        changes.append(("deepspeed", {"config": REPLICATE, **node}))
    several = config.deepspeed.stage == 3 and cluster.hosts > 1 and config.train.mode == "lora"
    if several and config.deepspeed.shard_group == "world":
        changes.append(("deepspeed", {"shard_group": "node"}))
    changes += [("train", {"micro_batch_size": size * 2**i}) for i in range(1, 5) if size * 2**i <= most]
    seconds, gains = predict(shape, config, cluster).seconds["step"], []
    for change in changes:
        changed = _with(config, [change])
        found = predict(shape, changed, cluster)
        gain = seconds / found.seconds["step"]
        if gain >= WORTH and all(found.peak(phase) <= cluster.bytes_per_rank for phase in found.memory):
            gains.append((gain, _text(change)))
    return [f"{text} ({gain:.2f} x)" for gain, text in sorted(gains, reverse=True)]


def _in_host_memory(shape: Shape, config: Config, cluster: Cluster) -> str:
    size = host_bytes(shape, config, cluster)
    return f" ({size / 1e9:.0f} GB of each host's memory)" if size else ""


def _text(change: Change) -> str:
    text = " ".join(f"{change[0]}.{name}={value}" for name, value in change[1].items())
    return f"{text} (cuts longer samples)" if change[0] == "data" else text


def _with(config: Config, changes: Iterable[Change]) -> Config:
    for group, fields in changes:
        config = config.model_copy(update={group: getattr(config, group).model_copy(update=fields)})
    return config


def _changes(config: Config) -> list[list[Change]]:
    """Settings that save memory, in families of which one is made; families and their members the cheapest first."""
    size, length, groups = config.train.micro_batch_size, config.data.max_length, config.init.layer_groups
    families: list[list[Change]] = [
        [("model", {"recompute": "all"})] if config.model.recompute != "auto" else [],
        [("deepspeed", {"config": PARTITION})] if config.deepspeed.stage == 0 and os.path.isfile(PARTITION) else [],
        [("init", {"layer_groups": groups * 2**i}) for i in range(1, 7)],
        [("init", {"buffer": "host"})],
        [("train", {"micro_batch_size": size // 2**i}) for i in range(1, size.bit_length())],
        [("deepspeed", {"shard_group": "world"})],
        [("deepspeed", {"config": OFFLOAD})] if os.path.isfile(OFFLOAD) else [],
        [("data", {"max_length": length // 2**i}) for i in range(1, 4)],
    ]
    if config.train.mode == "full":  # nothing is initialised, and the weights are not offloaded
        idle = [("deepspeed", {"config": OFFLOAD})]
        families = [[change for change in family if change[0] != "init" and change not in idle] for family in families]
    return families


def _alone(shape: Shape, config: Config, cluster: Cluster, phase: str) -> list[Change]:
    """Of each family the cheapest change that is enough by itself."""
    found = []
    for family in _changes(config):
        enough = [c for c in family if _peak(shape, _with(config, [c]), cluster, phase) <= cluster.bytes_per_rank]
        found += enough[:1]
    return found


def _together(shape: Shape, config: Config, cluster: Cluster, phase: str) -> tuple[list[Change], int]:
    """Changes of several families, none of them idle, and the peak with all of them."""
    limit = cluster.bytes_per_rank

    def peak(changes: list[Change]) -> int:
        return _peak(shape, _with(config, changes), cluster, phase)

    chosen: list[Change] = []
    for family in _changes(config):
        best = min((peak([*chosen, change]) for change in family), default=peak(chosen))
        if best < peak(chosen) > limit:
            chosen.append(next(c for c in family if peak([*chosen, c]) <= NEARLY * best))
    for change in list(chosen):
        fewer = [c for c in chosen if c != change]
        if peak(fewer) <= max(limit, peak(chosen)):
            chosen = fewer
    return chosen, peak(chosen)


def _peak(shape: Shape, config: Config, cluster: Cluster, phase: str) -> int:
    return sum(memory_by_phase(shape, config, cluster)[phase].values())
