"""What a run will take, before a weight is read: bytes a rank, bytes on the wire, operations, seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_one_dist.config.settings import Config
from lora_one_dist.plan.memory import memory_and_recomputed
from lora_one_dist.plan.seconds import operations_by_phase, seconds_by_phase
from lora_one_dist.plan.shape import Cluster, Shape
from lora_one_dist.plan.wire import Wire, wire_by_phase


@dataclass(frozen=True)
class Prediction:
    """All of it.  Bytes of memory per rank (the fullest one) and phase, term by term."""

    memory: dict[str, dict[str, int]]
    wire: dict[str, Wire]
    operations: dict[str, float]
    recomputed: dict[str, int]
    """Blocks that backward computes again, in the phases that have one."""
    seconds: dict[str, float] = field(default_factory=dict)

    def peak(self, phase: str) -> int:
        return sum(self.memory[phase].values())


def predict(shape: Shape, config: Config, cluster: Cluster) -> Prediction:
    """Memory, wire, operations and seconds of a run's phases.  Loading sends nothing; its seconds are the disk's.

    Phases: ``load``, ``gradient`` and ``svd`` (of one layer group; the methods with none have none), ``broadcast``, and
    ``step`` (one optimizer step).  Wire, operations and seconds of the first three are those of all layer groups.
    """
    memory, again = memory_and_recomputed(shape, config, cluster)
    wire = wire_by_phase(shape, config, cluster)
    operations = operations_by_phase(shape, config, cluster, again)
    seconds = seconds_by_phase(shape, config, cluster, wire, operations, again)
    return Prediction(memory, wire, operations, again, seconds)
