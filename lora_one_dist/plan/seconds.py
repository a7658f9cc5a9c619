"""Operations and seconds of each phase: predictions, as if work and wire overlapped well."""

from __future__ import annotations

from collections.abc import Mapping

from lora_one_dist.cluster import ownership
from lora_one_dist.config.settings import Config
from lora_one_dist.initialise.pairs import singular_vectors_needed
from lora_one_dist.initialise.spectral import krylov_width
from lora_one_dist.plan.memory import BLOCKS_EXPECTED
from lora_one_dist.plan.shape import (
    Cluster,
    Shape,
    fullest_owner,
    parts_of_batch,
    passes_of,
    passes_of_init,
    share_below,
    tokens_of,
)
from lora_one_dist.plan.wire import Wire

HOST_SECONDS = 2e-3  # to start a block's kernels, forward and backward; as much again where it is recomputed (estimate)
FP32_SHARE = 1 / 8  # of a GPU's bf16 speed that the fp32 products of an SVD reach
PHASES = ("load", "gradient", "gather weights", "svd", "broadcast", "step")


def operations_by_phase(
    shape: Shape, config: Config, cluster: Cluster, recomputed: Mapping[str, int]
) -> dict[str, float]:
    """Per rank.  A product with P parameters takes 2 P a token forward and 2 P for dX; attention 2 T h L more, halved
    by causality; what is ``recomputed``, so many blocks in a phase, counts."""
    if config.train.mode == "full":
        return {"step": _of_all_trained(shape, config, cluster, recomputed["step"])}
    targets, found = sum(target.m * target.n for target in shape.targets), {}
    groups = ownership.split([float(target.m * target.n) for target in shape.targets], config.init.layer_groups)
    parts = parts_of_batch(config)
    if config.init.takes_gradient:
        passes, tokens = parts * passes_of_init(config, cluster), tokens_of("gradient", config)
        forward, again = _forward(shape, config, tokens), _again(shape, config, tokens) * recomputed["gradient"]
        back = sum(1.0 - share_below(shape, group) for group in groups)
        found["gradient"] = passes * (forward * len(groups) + (forward + again) * back + 2.0 * tokens * targets)
    if config.init.takes_svd:
        _, owned = fullest_owner(shape, config, cluster)
        widths = [krylov_width(singular_vectors_needed(config.init, target.r)) for target in owned]
        columns = sum(width * target.m * target.n for width, target in zip(widths, owned, strict=True))
        found["svd"] = 4.0 * BLOCKS_EXPECTED * (3 if parts == 2 else 1) * columns * len(groups)
    passes, tokens = _passes_of_step(config, cluster), tokens_of("step", config)
    forward, again = _forward(shape, config, tokens), _again(shape, config, tokens) * recomputed["step"]
    found["step"] = passes * (2 * forward + again + 6.0 * tokens * shape.adapter + _of_trained_head(shape, tokens))
    return found


def _of_all_trained(shape: Shape, config: Config, cluster: Cluster, recomputed: int) -> float:
    """A third time as much for the weights' gradients."""
    tokens = tokens_of("step", config)
    forward, weights = _forward(shape, config, tokens), 2.0 * tokens * (shape.parameters - shape.lookup_only)
    return _passes_of_step(config, cluster) * (2 * forward + weights + _again(shape, config, tokens) * recomputed)


def needed_operations(shape: Shape, tokens: int, pairs: int) -> tuple[float, float]:
    """What a step must do at least: 4 N a token for N parameters that are multiplied by, and with attention beside.

    6 N where every weight is trained.  Nothing that is computed again counts, nor what the adapters add; a trained
    head's gradient does.  ``pairs``: sum of the documents' squared lengths.
    """
    times = 4.0 if shape.targets else 6.0
    products = times * tokens * shape.passed + _of_trained_head(shape, tokens)
    attention = 6.0 * pairs * shape.queries * shape.passed_layers
    return products, products + attention  # 2 + 4 forward and back, halved, twice


def _passes_of_step(config: Config, cluster: Cluster) -> int:
    return passes_of(config.train.global_batch_size, config.train.micro_batch_size, cluster.ranks)


def _of_trained_head(shape: Shape, tokens: int) -> float:
    """The gradient of an output head, 2 a token and element; of rows beside the base's their products too."""
    table = shape.trained_head
    return 0.0 if table is None else (2.0 if table.whole else 6.0) * tokens * table.size


def _attention(shape: Shape, config: Config, tokens: int) -> float:
    """Of a block."""
    return 2.0 * tokens * config.data.max_length * shape.hidden


def _forward(shape: Shape, config: Config, tokens: int) -> float:
    products = 2.0 * tokens * (shape.parameters - shape.lookup_only)
    return products + _attention(shape, config, tokens) * shape.layers


def _again(shape: Shape, config: Config, tokens: int) -> float:
    """To compute a block once more."""
    left_out = shape.last_linear if config.model.checkpointing == "non_reentrant" else 0
    products = 2.0 * tokens * (shape.recomputed - left_out) / max(1, shape.layers - 1)
    return products + _attention(shape, config, tokens)


def seconds_by_phase(
    shape: Shape,
    config: Config,
    cluster: Cluster,
    wire: Mapping[str, Wire],
    operations: Mapping[str, float],
    recomputed: Mapping[str, int],
) -> dict[str, float]:
    """The longest of work, wire and, on GPUs, what the host takes to start the work, phase by phase: as if they
    overlapped well."""
    found = {}
    for phase in (name for name in PHASES if name in operations or name in wire):
        speed = cluster.operations * (FP32_SHARE if phase == "svd" else 1.0)
        moved = wire.get(phase, Wire())
        on_wire = moved.inside / cluster.ranks / cluster.inside + moved.between / cluster.ranks / cluster.between
        found[phase] = max(operations.get(phase, 0.0) / speed, on_wire)
    if cluster.backend == "nccl":
        passes = {"step": _passes_of_step(config, cluster)}
        if "gradient" in found:
            passes["gradient"] = config.init.layer_groups * parts_of_batch(config) * passes_of_init(config, cluster)
        for phase, count in passes.items():
            found[phase] = max(found[phase], count * HOST_SECONDS * (shape.layers + recomputed[phase]))
    return found
