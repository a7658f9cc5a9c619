"""Does the run fit, and how few blocks need be computed again?  Asked of the plan, and the same on every rank.

In: a config and a model without values.  Out: a refusal before a weight is read, or the blocks of each phase.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lora_one_dist.base.recompute import recompute_blocks
from lora_one_dist.base.sharding import Base
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config, ModelConfig
from lora_one_dist.plan.advice import advice, faster
from lora_one_dist.plan.prediction import Prediction, predict
from lora_one_dist.plan.shape import Cluster, Shape, shape_of
from lora_one_dist.run.inputs import Inputs

GB = 1e9
USABLE = 0.92  # of a GPU: the rest is CUDA's, NCCL's and fragments
CGROUPS = Path("/sys/fs/cgroup")


class FitError(ValueError):
    """The run needs more memory than its ranks may fill."""


@dataclass(frozen=True)
class Fit:
    """What was predicted within the limit, and the blocks that backward computes again."""

    limit: float
    """Bytes that each rank may fill: the least of all ranks'."""
    shape: Shape
    prediction: Prediction
    faster: list[str]
    """Settings that would fit too and are faster by the plan; none on CPUs, of whose speed it knows nothing."""

    def recompute(self, base: Base, config: ModelConfig, phase: str) -> None:
        """Set the model for ``gradient`` or ``step``."""
        recompute_blocks(base.module, self.count(phase), config.checkpointing == "reentrant")

    def count(self, phase: str) -> int:
        return self.prediction.recomputed.get(phase, self.prediction.recomputed["step"])

    @property
    def summary(self) -> str:
        phases = {"initialising": self.count("gradient"), "training": self.count("step")}
        if not self.shape.targets:  # every weight is trained: there is nothing to initialise
            del phases["initialising"]
        counts = " and ".join(f"{count} while {doing}" for doing, count in phases.items())
        text = f"of {self.shape.layers} blocks backward recomputes {counts}, within {self.limit / GB:.1f} GB a rank"
        return text + (f"; faster, and it would still fit: {'; '.join(self.faster)}" if self.faster else "")


def fit(config: Config, read: Inputs, begins: bool) -> Fit:
    """Plan the run within the memory that there is.  Reads no weight.  Collective.

    Args:
        begins: will the run initialise, or go on from a checkpoint?

    Raises:
        RankError: on all ranks, if a phase does not fit: what it needs, and what to change.
    """
    limits = comm.all_gather_floats(_limit(config.model))
    cluster = _cluster(config, min(limits))
    shape = shape_of(read.plan.skeleton, read.plan.targets, config.deepspeed.persistence_threshold, read.tables)
    planned = _as_run(config, read, begins)
    with comm.all_or_none("checking that the run fits"):
        problems = advice(shape, planned, cluster)
        if problems:
            raise FitError(
                f"model.memory_gb = {config.model.memory_gb}, {min(limits) / GB:.2f} GB on rank "
                f"{limits.index(min(limits))}: the run does not fit. {' '.join(problems)} Or raise model.memory_gb, if "
                "more is there."
            )
    better = faster(shape, planned, cluster) if cluster.backend == "nccl" else []
    return Fit(min(limits), shape, predict(shape, planned, cluster), better)


def _as_run(config: Config, read: Inputs, begins: bool) -> Config:
    """The config as far as memory depends on it: samples as long as they are, and no initialisation that is not run."""
    longest = max(int(tokens.lengths.max()) for tokens in (read.train, read.held and read.held.tokens) if tokens)
    data = config.data.model_copy(update={"max_length": min(longest, config.data.max_length)})
    init = config.init
    if not begins or init.adapter is not None:
        init = init.model_copy(update={"method": "lora"})  # that takes no gradient and no SVD
    return config.model_copy(update={"data": data, "init": init})


def _cluster(config: Config, limit: float) -> Cluster:
    """This job.  Of hosts with unequal numbers of ranks the smallest is taken for each, where it matters."""
    backend = "nccl" if comm.device().type == "cuda" else "gloo"
    ranks = Counter(comm.here().host_of).values()
    if len(set(ranks)) > 1 and config.deepspeed.shard_group == "world":
        return Cluster(1, comm.world_size(), bytes_per_rank=limit, backend=backend)
    return Cluster(len(ranks), min(ranks), bytes_per_rank=limit, backend=backend)


def _limit(config: ModelConfig) -> float:
    """Bytes that this rank may fill."""
    if config.memory_gb != "auto":
        return config.memory_gb * GB
    if comm.device().type == "cuda":
        return USABLE * torch.cuda.get_device_properties(comm.device()).total_memory
    return min(psutil.virtual_memory().available, _left_in_cgroup()) / len(comm.here().host_ranks)


def _left_in_cgroup() -> float:
    """What the control group of this process, version 2, lets its processes take beside what they have."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").is_file() else []
    left = math.inf
    for own in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for folder in (CGROUPS / own, *(CGROUPS / own).parents):
            limit = folder / "memory.max"
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                left = min(left, int(text) - int((folder / "memory.current").read_text()))
    return left
