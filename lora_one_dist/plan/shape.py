"""What a plan is made for: a model as far as memory and work depend on it, a cluster, and a run's counts.

Symbols in this room: T tokens of a micro-batch (padding included), h hidden size, f intermediate size, L blocks, V
words, e bytes an element, P parameters of the base, S ranks that share one copy of it, R ranks, H hosts, p adapter
parameters.  All of the room is pure, reads no weight and is not collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_one_dist.base.blocks import blocks, has_encoder, parts
from lora_one_dist.base.recompute import most_blocks
from lora_one_dist.base.tables import Table
from lora_one_dist.base.targets import LINEAR, Target
from lora_one_dist.cluster import ownership
from lora_one_dist.config.settings import Config


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
    passed: int
    """What a token is multiplied by: all but ``lookup_only``, or what the smaller of an encoder and a decoder has, of
    which it passes one; ``passed_layers``: through how many blocks."""
    passed_layers: int
    recomputed: int
    """In the blocks that may run again in backward: all but the last; ``recomputable``: how many these are."""
    recomputable: int
    last_linear: int
    """Of them in the last linear layer of each block, which non-reentrant checkpointing leaves out."""
    hidden: int
    intermediate: int
    norms: int
    """Wide: what the norms of a block see of a token, all together; 2 h for most models."""
    heads: int
    queries: int
    """Wide: heads times their size; ``keys``: of keys and of values each."""
    keys: int
    layers: int
    vocabulary: int
    attention: str
    """Its kernel, as transformers names it."""
    targets: tuple[Target, ...]
    tables: tuple[Table, ...] = ()
    """Embedding and head where rows of theirs are trained."""

    @property
    def adapter(self) -> int:
        """Elements of the adapters that are trained."""
        return sum(target.adapter for target in self.targets)

    @property
    def pairs(self) -> int:
        """Elements of the adapters' pairs."""
        return sum(target.pair for target in self.targets)

    @property
    def trained_head(self) -> Table | None:
        """The table of the output head, if rows of it are trained."""
        return next((table for table in self.tables if table.has_head), None)

    @property
    def frozen(self) -> Shape:
        """As it is once whole tables stand in the base's place: what ZeRO-3 still holds."""
        whole = [table for table in self.tables if table.whole]
        looked_up = 0 if any(not table.has_head for table in whole) else self.lookup_only
        left = self.parameters - sum(table.old * table.width for table in whole)
        return replace(self, parameters=left, lookup_only=looked_up)

    def rows_share(self, ranks: int) -> int:
        """Elements of tables that one of so many ranks owns."""
        return sum(-(-table.trained // ranks) * table.width for table in self.tables)


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


def shape_of(
    skeleton: Any, targets: Sequence[Target], persistence_threshold: int, tables: Sequence[Table] = ()
) -> Shape:
    """Of a transformers model; its parameters may be on the meta device."""
    config = skeleton.config.get_text_config()
    embedding, head = skeleton.get_input_embeddings().weight, getattr(skeleton.get_output_embeddings(), "weight", None)
    sizes = [parameter.numel() for parameter in skeleton.parameters()]
    block_sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(skeleton)]
    linear = [[layer for layer in block.modules() if isinstance(layer, LINEAR)] for block in blocks(skeleton)[:-1]]
    hidden = _largest(config, "hidden_size") or embedding.shape[1]
    heads = _largest(config, "num_attention_heads") or 1
    head_size = _largest(config, "head_dim") or hidden // heads
    queries, keys = heads * head_size, (_largest(config, "num_key_value_heads") or heads) * head_size
    lookup_only = 0 if head is embedding else embedding.numel()
    two = parts(skeleton) if has_encoder(skeleton) else ()
    passed = [sum(p.numel() for block in blocks(part) for p in block.parameters()) for part in two]
    return Shape(
        parameters=sum(sizes),
        persistent=sum(size for size in sizes if size < persistence_threshold),
        largest_tensor=max(sizes),
        largest_block=max(block_sizes, default=max(sizes)),
        lookup_only=lookup_only,
        passed=min(passed, default=sum(sizes) - lookup_only),
        passed_layers=min((len(blocks(part)) for part in two), default=len(block_sizes)),
        recomputed=sum(block_sizes[:-1]),
        recomputable=most_blocks(skeleton),
        last_linear=sum(layers[-1].weight.numel() for layers in linear if layers),
        hidden=hidden,
        intermediate=_largest(config, "intermediate_size") or _widest(two) or 4 * hidden,
        norms=_norms(next(iter(blocks(skeleton)), skeleton), head_size, queries, keys),
        heads=heads,
        queries=queries,
        keys=keys,
        layers=len(block_sizes),
        vocabulary=embedding.shape[0],
        attention=str(skeleton.config._attn_implementation),
        targets=tuple(targets),
        tables=tuple(tables),
    )


def _largest(config: Any, name: str) -> int:
    """A size of the config, of all layers' where they differ in it; 0 if it has none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers 5.23, of a config whose layers differ: Gemma 4's heads
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max((each or 0 for each in value), default=0) if isinstance(value, list | tuple) else value or 0


def _widest(stacks: Iterable[nn.Module]) -> int:
    """What the widest layer in the blocks gives out: the feed-forward network's, whatever the config calls it."""
    layers = (layer for stack in stacks for block in blocks(stack) for layer in block.modules())
    return max((layer.weight.shape[0] for layer in layers if isinstance(layer, nn.Linear)), default=0)


def _norms(block: nn.Module, head_size: int, queries: int, keys: int) -> int:
    """What the norms in a block see of a token: those of single heads see every head."""
    width = 0
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter):
            of_heads = {"q_norm": queries, "k_norm": keys}.get(name.rpartition(".")[2], head_size)
            width += of_heads if weight.numel() == head_size else weight.numel()
    return width


def tokens_of(phase: str, config: Config) -> int:
    """T, of a micro-batch of ``gradient`` or ``step``."""
    size = config.init_micro_batch_size if phase == "gradient" else config.train.micro_batch_size
    return size * config.data.max_length


def ranks_a_copy(config: Config, cluster: Cluster) -> int:
    """S: ranks that share one copy of the base."""
    if config.deepspeed.stage != 3:
        return 1
    return cluster.ranks if config.deepspeed.shard_group == "world" else cluster.ranks_per_host


def element_bytes(config: Config) -> int:
    """e: of the base and of the adapters' working copies."""
    return 2 if config.model.dtype == "bf16" else 4


def parts_of_batch(config: Config) -> int:
    """Parts of the init batch whose gradients are kept apart: 2 for ``init.halves``."""
    return 2 if config.init.halves and config.init.takes_gradient and config.init.num_samples > 1 else 1


def fullest_owner(shape: Shape, config: Config, cluster: Cluster) -> tuple[int, list[Target]]:
    """Elements of the fullest owner's matrices in the largest layer group, and which they are."""
    fullest: tuple[int, list[Target]] = (0, [])
    costs = [float(target.m * target.n) for target in shape.targets]
    for group in ownership.split(costs, config.init.layer_groups):
        owners = ownership.assign([costs[i] for i in group], cluster.ranks)
        for rank in range(cluster.ranks):
            own = [shape.targets[i] for i, owner in zip(group, owners, strict=True) if owner == rank]
            fullest = max(fullest, (sum(t.m * t.n for t in own), own), key=lambda found: found[0])
    return fullest


def share_below(shape: Shape, group: Sequence[int]) -> float:
    """Share of the parameters in the blocks below the first that holds one of these targets."""
    return group[0] * shape.layers // len(shape.targets) * shape.largest_block / shape.parameters


def passes_of_init(config: Config, cluster: Cluster) -> int:
    """Micro-batches that each rank runs for each part of the init batch."""
    samples = -(-config.init.num_samples // parts_of_batch(config))
    return passes_of(samples, config.init_micro_batch_size, cluster.ranks)


def passes_of(samples: int, micro_batch_size: int, ranks: int) -> int:
    """Micro-batches that each rank runs."""
    return -(-samples // (micro_batch_size * ranks))
