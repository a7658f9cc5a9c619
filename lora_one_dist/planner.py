"""What a run will take, before a weight is read: bytes per rank and phase, bytes on the wire, operations, seconds.

In: the shapes of a model (its config.json is enough), the run's config with its ZeRO JSON, a cluster.  Out: numbers,
term by term.  Pure; not collective.  A benchmark (tools/bench/phases.py) holds memory and gloo's wire against
measurements; what is said of NCCL and of seconds are predictions.

Symbols: T tokens of a micro-batch (padding included), h hidden size, f intermediate size, L blocks, V words, e bytes an
element, P parameters of the base, S ranks that share one copy of it, R ranks, H hosts, p adapter parameters.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_one_dist import ownership
from lora_one_dist.config import COMPENSATED_METHODS, GRADIENT_METHODS, Config
from lora_one_dist.gradient import IN_FLIGHT
from lora_one_dist.initialize import singular_vectors_needed
from lora_one_dist.model import LOSS_BYTES, Target
from lora_one_dist.optim import make_layout
from lora_one_dist.sharding import REUSE_DISTANCE, SLAB_BYTES, blocks, with_fetch_sizes
from lora_one_dist.spectral import FULL_BLOCKS, krylov_width

BLOCKS_EXPECTED = 6  # of a Krylov space; real gradients take 3 to 8
LOSS_COPIES = 3  # of some rows of the logits in fp32, while the loss is taken
GLOO_SEGMENT_BYTES = 2**20  # gloo's kMaxSegmentSize
FP32_SHARE = 1 / 8  # of a GPU's bf16 speed that the fp32 products of an SVD reach
NEARLY = 1.02  # times the least peak that a setting can reach: good enough, where it costs less
PARTITION, OFFLOAD = "ds_configs/zero3.json", "ds_configs/zero3_offload.json"  # of a checkout, where runs start


PHASES = ("load", "gradient", "gather weights", "svd", "broadcast", "step")


@dataclass(frozen=True)
class Shape:
    """A model, as far as memory and work depend on it.  Elements, not bytes."""

    parameters: int
    persistent: int
    """In parameters below ``stage3_param_persistence_threshold``: ZeRO-3 keeps a second, whole copy of them."""
    largest_tensor: int
    largest_block: int
    lookup_only: int
    """In the embedding, unless the output head multiplies by it too."""
    recomputed: int
    """In the blocks that reentrant checkpointing runs again: all but the last."""
    last_linear: int
    """Of them in the last linear layer of each block, which non-reentrant checkpointing leaves out."""
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    targets: tuple[Target, ...]

    @property
    def adapter(self) -> int:
        """Adapter parameters for r 1."""
        return sum(target.m + target.n for target in self.targets)


@dataclass(frozen=True)
class Cluster:
    """Where a run goes.  Speeds per rank, in bytes and operations a second; of use for :func:`seconds` alone."""

    hosts: int
    ranks_per_host: int
    bytes_per_rank: float = 80e9
    operations: float = 4e14
    inside: float = 2e11
    between: float = 2.5e10
    backend: str = "nccl"

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host


@dataclass
class Wire:
    """Bytes sent in a phase, by all ranks together: to a rank of the same host, and to one of another."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.inside + other.inside, self.between + other.between)

    def __mul__(self, times: float) -> Wire:
        return Wire(self.inside * times, self.between * times)


@dataclass(frozen=True)
class Prediction:
    """All of it.  Bytes of memory per rank (the fullest one) and phase, term by term."""

    memory: dict[str, dict[str, int]]
    wire: dict[str, Wire]
    operations: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)

    def peak(self, phase: str) -> int:
        return sum(self.memory[phase].values())


def shape_of(skeleton: Any, targets: Sequence[Target], persistence_threshold: int) -> Shape:
    """Of a transformers model; its parameters may be on the meta device."""
    config = skeleton.config.get_text_config()
    embedding, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight
    sizes = [parameter.numel() for parameter in skeleton.parameters()]
    block_sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(skeleton)]
    linear = [[layer for layer in block.modules() if isinstance(layer, nn.Linear)] for block in blocks(skeleton)[:-1]]
    hidden = config.hidden_size
    return Shape(
        parameters=sum(sizes),
        persistent=sum(size for size in sizes if size < persistence_threshold),
        largest_tensor=max(sizes),
        largest_block=max(block_sizes, default=max(sizes)),
        lookup_only=0 if head is embedding else embedding.numel(),
        recomputed=sum(block_sizes[:-1]),
        last_linear=sum(layers[-1].weight.numel() for layers in linear if layers),
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        targets=tuple(targets),
    )


def predict(shape: Shape, config: Config, cluster: Cluster) -> Prediction:
    """Memory, wire, operations and seconds of a run's phases.  Loading sends nothing; its seconds are the disk's.

    Phases: ``load``, ``gradient`` and ``svd`` (of one layer group; the methods with none have none), ``broadcast``, and
    ``step`` (one optimizer step).  Wire, operations and seconds of the first three are those of all layer groups.
    """
    tokens = config.train.micro_batch_size * config.data.max_length
    memory = _memory(shape, config, cluster)
    wire = _wire(shape, config, cluster)
    operations = _operations(shape, config, cluster, tokens)
    return Prediction(memory, wire, operations, _seconds(shape, config, cluster, wire, operations))


def _sharers(config: Config, cluster: Cluster) -> int:
    if config.deepspeed.stage != 3:
        return 1
    return cluster.ranks if config.deepspeed.shard_group == "world" else cluster.ranks_per_host


def _zero(config: Config) -> Mapping[str, Any]:
    return config.deepspeed.zero


def _element_size(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def kept_gathered(shape: Shape, zero: Mapping[str, Any]) -> int:
    """Elements that ZeRO-3 keeps from forward to backward: ``stage3_max_reuse_distance`` of them (measured)."""
    return min(shape.parameters, int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)))


def gathered(shape: Shape, zero: Mapping[str, Any], recorded: bool) -> int:
    """Elements that ZeRO-3 holds whole at one time.

    What it keeps for reuse; the largest tensor or a block, whichever is more with what it may fetch ahead beside it,
    each twice: as the flat buffer of a gathering and as what is cut from it.  Once it has ``recorded`` the order of a
    pass, which the few passes of an initialisation hardly do, it holds a block beside the largest tensor, twice, and
    one more (measured).
    """
    zero = with_fetch_sizes(zero, shape.largest_block)
    kept, block, tensor = kept_gathered(shape, zero), shape.largest_block, shape.largest_tensor
    bucket, live = int(zero["stage3_prefetch_bucket_size"]), int(zero["stage3_max_live_parameters"])
    with_tensor, with_block = (whole + min(bucket, max(0, live - kept - whole)) for whole in (tensor, block))
    most = kept + (2 * (block + with_tensor) + block if recorded else 2 * max(with_tensor, with_block))
    return min(shape.parameters + block + bucket, most)


def _memory(shape: Shape, config: Config, cluster: Cluster) -> dict[str, dict[str, int]]:
    """Terms in bytes:

    - ``base``         e P / S on the device (under ``offload_param`` in host memory: 0 here)
    - ``persistent``   e times the parameters of which ZeRO-3 keeps a second, whole copy
    - ``largest_tensor``  of the load: e times it, while it is cut; ``staging``: SLAB_BYTES on their way to a GPU
    - ``gathered``     e :func:`gathered`: what ZeRO-3 holds whole at one time (0 on one rank or under stage 0)
    - ``owned``        4 sum(m n) over the fullest owner's targets of a layer group, for each part of the batch; 0 if
                       ``init.buffer`` is host
    - ``in_flight``    4 IN_FLIGHT max(m n): gradients on their way to their owner (0 on one rank)
    - ``upcast``       4 T max(m + n) if e < 4: dY and X in fp32, where there is no mixed product (0 on a GPU)
    - ``block_inputs`` e T h (L + 1), with gradient checkpointing
    - ``activations``  T (16 e h + 5 e f) for the last or a recomputed block (for all L without checkpointing)
    - ``logits``       e T V, and a few rows of them in fp32 (LOSS_COPIES LOSS_BYTES)
    - ``krylov``       the largest owned layer's SVD (:mod:`lora_one_dist.spectral`)
    - ``pairs``        4 r sum(m + n): the adapters to be, on every rank from the broadcast on
    - ``compensated pairs``  4 r sum(m + n) more while training, for the methods that change the base
    - ``adapters``     (e + 4) p: working copies and send buffer;  ``states``: 16 p / R at the owner
    """
    e, sharers = _element_size(config), _sharers(config, cluster)
    zero, tokens = _zero(config), config.train.micro_batch_size * config.data.max_length
    on_gpu = cluster.backend == "nccl"
    offloaded = config.deepspeed.offloads and on_gpu
    several = config.deepspeed.stage == 3 and (sharers > 1 or offloaded)  # as model.is_partitioned
    base = {"base": 0 if offloaded else e * (shape.parameters // sharers)}
    if config.deepspeed.stage == 3:
        base["persistent"] = e * shape.persistent if several else 0
    activations = _activations(shape, tokens, e, config.model.gradient_checkpointing != "none")
    first, later = (
        base | {"gathered": e * gathered(shape, zero, recorded) if several else 0, **activations}
        for recorded in (False, True)
    )
    staging = SLAB_BYTES if on_gpu else 0
    largest = e * shape.largest_tensor if several else 0
    found = {"load": base | {"largest_tensor": largest, "staging": staging}}
    r = config.lora.r
    pairs = 4 * r * shape.adapter
    if config.init.method in GRADIENT_METHODS:
        found["gradient"] = first | gradient_terms(shape, config, cluster, tokens)
        if several and _init_passes(config, cluster) == 1:
            found["gradient"]["gathered"] = _gathered_once(shape, zero, e, found["gradient"])
    if config.init.method != "lora":
        owned, largest_owned = _owned(shape, config, cluster)
        on_host = config.init.buffer == "host" and on_gpu  # of them one at a time is on the device
        held = 4 * _parts(config) * (max(t.m * t.n for t in shape.targets) if on_host else owned)
        needed = singular_vectors_needed(config.init.method, r)
        krylov = max((krylov_bytes(target, needed) for target in largest_owned), default=0)
        found["svd"] = base | {"owned": held, "krylov": krylov, "pairs": pairs // cluster.ranks}
        found["broadcast"] = base | {"pairs": 2 * pairs}
    p = make_layout(shape.targets, r, cluster.ranks).share * cluster.ranks
    kept = pairs if config.init.method in COMPENSATED_METHODS else 0
    states = {"adapters": (e + 4) * p, "states": 16 * p // cluster.ranks}
    found["step"] = later | states | ({"compensated pairs": kept} if kept else {})
    return found


def _gathered_once(shape: Shape, zero: Mapping[str, Any], e: int, terms: Mapping[str, int]) -> int:
    """Bytes of ``gathered`` where each rank runs one micro-batch.

    The order of a pass is not known yet, so nothing is fetched ahead; and the owner's sums are whole only where
    backward ends, far from the largest tensor.
    """
    at_the_end = e * (kept_gathered(shape, zero) + 2 * shape.largest_block)
    return at_the_end + max(0, 2 * e * shape.largest_tensor - terms["owned"] - terms["in_flight"])


def _activations(shape: Shape, tokens: int, e: int, checkpointing: bool) -> dict[str, int]:
    at_once = 1 if checkpointing else shape.layers
    block = at_once * tokens * e * (16 * shape.hidden + 5 * shape.intermediate)
    logits = e * tokens * shape.vocabulary + LOSS_COPIES * min(LOSS_BYTES, 4 * tokens * shape.vocabulary)
    inputs = e * tokens * shape.hidden * (shape.layers + 1) if checkpointing else 0
    return {"block_inputs": inputs, "activations": block, "logits": logits}


def gradient_terms(shape: Shape, config: Config, cluster: Cluster, tokens: int) -> dict[str, int]:
    """Of the gradient phase alone, beside the base and the activations."""
    e, on_gpu = _element_size(config), cluster.backend == "nccl"
    owned, _ = _owned(shape, config, cluster)
    largest = max(target.m * target.n for target in shape.targets)
    upcast = 0 if e == 4 or on_gpu else 4 * tokens * max(target.m + target.n for target in shape.targets)
    host = config.init.buffer == "host" and on_gpu
    return {
        "owned": 0 if host else 4 * _parts(config) * owned,
        "in_flight": 4 * IN_FLIGHT * largest if cluster.ranks > 1 or host else 0,
        "upcast": upcast,
    }


def _parts(config: Config) -> int:
    return 2 if config.init.halves and config.init.method in GRADIENT_METHODS and config.init.num_samples > 1 else 1


def _owned(shape: Shape, config: Config, cluster: Cluster) -> tuple[int, list[Target]]:
    """Elements of the fullest owner's matrices in the largest layer group, and which they are."""
    fullest: tuple[int, list[Target]] = (0, [])
    costs = [float(target.m * target.n) for target in shape.targets]
    for group in ownership.split(costs, config.init.layer_groups):
        owners = ownership.assign([costs[i] for i in group], cluster.ranks)
        for rank in range(cluster.ranks):
            own = [shape.targets[i] for i, owner in zip(group, owners, strict=True) if owner == rank]
            fullest = max(fullest, (sum(t.m * t.n for t in own), own), key=lambda found: found[0])
    return fullest


def krylov_bytes(target: Target, r: int) -> int:
    """Of one SVD: bases of both sides and their images, or of a full one."""
    width = krylov_width(r)
    if min(target.m, target.n) <= FULL_BLOCKS * width:
        return 4 * (target.m + target.n) * min(target.m, target.n)
    return 4 * BLOCKS_EXPECTED * width * (2 * target.m + 3 * target.n)


def ring(size: float, group: Iterable[int], ranks_per_host: int, rounds: float | None = None) -> Wire:
    """Each rank of a group of n sends a piece of ``size / n`` to the next, ``rounds`` times (n - 1 if not given)."""
    members = list(group)
    sent = size / len(members) * (len(members) - 1 if rounds is None else rounds)
    wire = Wire()
    for rank, following in zip(members, members[1:] + members[:1], strict=True):
        same = rank // ranks_per_host == following // ranks_per_host
        wire += Wire(sent, 0.0) if same else Wire(0.0, sent)
    return wire


def _to_owner(size: float, owner: int, cluster: Cluster) -> Wire:
    """A reduction to one rank.  NCCL: a chain.  gloo: around a ring in segments, then each rank sends its piece.

    gloo (reduce.cc) goes around until all segments but two have passed, where n - 1 of n pieces would do: all ranks
    together send a large tensor n + 1 times, not 2 (n - 1).
    """
    ranks, each = range(cluster.ranks), cluster.ranks_per_host
    if cluster.backend != "gloo":
        return Wire(size * (cluster.ranks - cluster.hosts), size * (cluster.hosts - 1))
    if cluster.ranks == 1:
        return Wire()
    most = max(2 * cluster.ranks, -(-int(size) // GLOO_SEGMENT_BYTES))
    segments = -(-most // cluster.ranks) * cluster.ranks
    wire = ring(size, ranks, each, rounds=cluster.ranks * (segments - 2) / segments)
    for rank in ranks:
        piece = size / cluster.ranks if rank != owner else 0.0
        wire += Wire(piece, 0.0) if rank // each == owner // each else Wire(0.0, piece)
    return wire


def _from_owner(size: float, owner: int, cluster: Cluster) -> Wire:
    """A broadcast.  gloo: a binomial tree; NCCL: a chain."""
    each, wire = cluster.ranks_per_host, Wire()
    if cluster.backend != "gloo":
        return Wire(size * (cluster.ranks - cluster.hosts), size * (cluster.hosts - 1))
    for number in range(1, cluster.ranks):
        parent = number ^ (1 << (number.bit_length() - 1))  # without its highest bit
        rank, source = ((place + owner) % cluster.ranks for place in (number, parent))
        wire += Wire(size, 0.0) if rank // each == source // each else Wire(0.0, size)
    return wire


def _base_gathers(shape: Shape, config: Config, cluster: Cluster, times: float) -> Wire:
    """All-gathers of the base, in each group that shares a copy."""
    sharers = _sharers(config, cluster)
    if sharers == 1:
        return Wire()
    groups = [range(first, first + sharers) for first in range(0, cluster.ranks, sharers)]
    size = _element_size(config) * (shape.parameters - shape.persistent) * times
    return sum((ring(size, group, cluster.ranks_per_host) for group in groups), Wire())


def gathers_a_pass(shape: Shape, zero: Mapping[str, Any], below: float = 0.0) -> float:
    """How often a forward and backward pass gathers the base.

    Twice; but an embedding that is looked up alone and the share ``below`` the first block that backward reaches have
    no backward, and what is kept for reuse is gathered once.
    """
    again = 1.0 - below - (shape.lookup_only + kept_gathered(shape, zero)) / shape.parameters
    return 1.0 + max(0.0, again)


def _below(shape: Shape, group: Sequence[int]) -> float:
    """Share of the parameters in the blocks below the first that holds one of these targets."""
    return group[0] * shape.layers // len(shape.targets) * shape.largest_block / shape.parameters


def _init_passes(config: Config, cluster: Cluster) -> int:
    """Micro-batches that each rank runs for each part of the init batch."""
    samples = -(-config.init.num_samples // _parts(config))
    return _passes(samples, config.train.micro_batch_size, cluster.ranks)


def _passes(samples: int, micro_batch_size: int, ranks: int) -> int:
    """Micro-batches that each rank runs."""
    return -(-samples // (micro_batch_size * ranks))


def _wire(shape: Shape, config: Config, cluster: Cluster) -> dict[str, Wire]:
    """Bytes sent by all ranks together, of one start and of one optimizer step."""
    found: dict[str, Wire] = {}
    r, ranks, each = config.lora.r, cluster.ranks, cluster.ranks_per_host
    zero = _zero(config)
    costs = [float(target.m * target.n) for target in shape.targets]
    groups = ownership.split(costs, config.init.layer_groups)
    gradient, broadcast = Wire(), Wire()
    if config.init.method in GRADIENT_METHODS:
        passes = _parts(config) * _init_passes(config, cluster)
    for group in groups:
        owners = ownership.assign([costs[i] for i in group], ranks)
        if config.init.method in GRADIENT_METHODS:
            times = gathers_a_pass(shape, zero, _below(shape, group))
            gradient += _base_gathers(shape, config, cluster, times * passes)
        for i, owner in zip(group, owners, strict=True):
            target = shape.targets[i]
            if config.init.method in GRADIENT_METHODS:
                gradient += _to_owner(4 * target.m * target.n, owner, cluster) * passes
            broadcast += _from_owner(4 * r * (target.m + target.n), owner, cluster)
    if config.init.method in GRADIENT_METHODS:
        found["gradient"] = gradient
    if config.init.method == "pissa":
        found["gather weights"] = _base_gathers(shape, config, cluster, 1.0)
    found["broadcast"] = broadcast
    share = make_layout(shape.targets, r, ranks).share
    inside = ranks * (each - 1) / each
    between = ranks * (cluster.hosts - 1) / cluster.hosts
    e = _element_size(config)
    reduce = Wire(inside * 4 * share * ranks, between * 4 * share * cluster.hosts)
    gather = Wire(inside * e * share * ranks, between * e * share * cluster.hosts)
    micro_batches = _passes(config.train.global_batch_size, config.train.micro_batch_size, ranks)
    times = micro_batches * gathers_a_pass(shape, zero)
    found["step"] = _base_gathers(shape, config, cluster, times) + reduce + gather
    return found


def _operations(shape: Shape, config: Config, cluster: Cluster, tokens: int) -> dict[str, float]:
    """Per rank.  A product with P parameters takes 2 P a token forward and 2 P for dX; attention 2 T h L more, halved
    by causality; what is recomputed counts."""
    attention = 2.0 * tokens * config.data.max_length * shape.hidden
    forward = 2.0 * tokens * (shape.parameters - shape.lookup_only) + attention * shape.layers
    checkpointing = config.model.gradient_checkpointing
    left_out = shape.last_linear if checkpointing == "non_reentrant" else 0
    again = 2.0 * tokens * (shape.recomputed - left_out) + attention * (shape.layers - 1)
    if checkpointing == "none":
        again = 0.0
    weights = 2.0 * tokens * sum(target.m * target.n for target in shape.targets)
    groups = ownership.split([float(target.m * target.n) for target in shape.targets], config.init.layer_groups)
    parts, found = _parts(config), {}
    if config.init.method in GRADIENT_METHODS:
        passes = parts * _init_passes(config, cluster)
        back = sum(1.0 - _below(shape, group) for group in groups)
        found["gradient"] = passes * (forward * len(groups) + (forward + again) * back + weights)
    if config.init.method != "lora":
        needed = singular_vectors_needed(config.init.method, config.lora.r)
        columns = BLOCKS_EXPECTED * krylov_width(needed) * (3 if parts == 2 else 1)
        owned, _ = _owned(shape, config, cluster)
        found["svd"] = 4.0 * columns * owned * len(groups)
    micro_batches = _passes(config.train.global_batch_size, config.train.micro_batch_size, cluster.ranks)
    adapters = 6.0 * tokens * config.lora.r * shape.adapter
    found["step"] = micro_batches * (2 * forward + again + adapters)
    return found


def _seconds(
    shape: Shape, config: Config, cluster: Cluster, wire: Mapping[str, Wire], operations: Mapping[str, float]
) -> dict[str, float]:
    """The longer of work and wire, phase by phase: as if they overlapped well."""
    found = {}
    for phase in (name for name in PHASES if name in operations or name in wire):
        speed = cluster.operations * (FP32_SHARE if phase == "svd" else 1.0)
        moved = wire.get(phase, Wire())
        on_wire = moved.inside / cluster.ranks / cluster.inside + moved.between / cluster.ranks / cluster.between
        found[phase] = max(operations.get(phase, 0.0) / speed, on_wire)
    return found


Change = tuple[str, dict[str, Any]]  # group of the config, and settings in it


def advice(shape: Shape, config: Config, cluster: Cluster) -> list[str]:
    """For each phase that does not fit into ``cluster.bytes_per_rank``: settings that make it, alone or together."""
    limit, found = cluster.bytes_per_rank, []
    for phase, terms in _memory(shape, config, cluster).items():
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


def host_bytes(shape: Shape, config: Config, cluster: Cluster) -> int:
    """What offload and host buffers take of a host's memory beside what the ranks' processes do."""
    size = 0
    if config.deepspeed.offloads:
        size += _element_size(config) * (shape.parameters // _sharers(config, cluster))
    if config.init.buffer == "host" and config.init.method != "lora":
        size += 4 * _parts(config) * _owned(shape, config, cluster)[0]
    return size * cluster.ranks_per_host


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
    return [
        [("model", {"gradient_checkpointing": "non_reentrant"})],
        [("deepspeed", {"config": PARTITION})] if config.deepspeed.stage == 0 and os.path.isfile(PARTITION) else [],
        [("init", {"layer_groups": groups * 2**i}) for i in range(1, 7)],
        [("init", {"buffer": "host"})],
        [("train", {"micro_batch_size": size // 2**i}) for i in range(1, size.bit_length())],
        [("deepspeed", {"shard_group": "world"})],
        [("deepspeed", {"config": OFFLOAD})] if os.path.isfile(OFFLOAD) else [],
        [("data", {"max_length": length // 2**i}) for i in range(1, 4)],
    ]


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
    return sum(_memory(shape, config, cluster)[phase].values())
