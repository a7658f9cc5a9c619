"""Bytes that all ranks together send in each phase: of gloo measured (tools/bench/phases.py), of NCCL predicted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_one_dist.cluster import ownership
from lora_one_dist.config.settings import Config
from lora_one_dist.plan.memory import kept_gathered
from lora_one_dist.plan.shape import (
    Cluster,
    Shape,
    element_bytes,
    parts_of_batch,
    passes_of,
    passes_of_init,
    ranks_a_copy,
    share_below,
)
from lora_one_dist.train.layout import make_layout

GLOO_SEGMENT_BYTES = 2**20  # gloo's kMaxSegmentSize


@dataclass
class Wire:
    """Bytes sent in a phase, by all ranks together: to a rank of the same host, and to one of another."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.inside + other.inside, self.between + other.between)

    def __mul__(self, times: float) -> Wire:
        return Wire(self.inside * times, self.between * times)


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
    sharers = ranks_a_copy(config, cluster)
    if sharers == 1:
        return Wire()
    groups = [range(first, first + sharers) for first in range(0, cluster.ranks, sharers)]
    size = element_bytes(config) * (shape.parameters - shape.persistent) * times
    return sum((ring(size, group, cluster.ranks_per_host) for group in groups), Wire())


def gathers_a_pass(shape: Shape, zero: Mapping[str, Any], below: float = 0.0) -> float:
    """How often a forward and backward pass gathers the base.

    Twice; but an embedding that is looked up alone and the share ``below`` the first block that backward reaches have
    no backward, and what is kept for reuse is gathered once.
    """
    again = 1.0 - below - (shape.lookup_only + kept_gathered(shape, zero)) / shape.parameters
    return 1.0 + max(0.0, again)


def _step_of_all(shape: Shape, config: Config, cluster: Cluster) -> Wire:
    """Where every weight is trained: its gradient goes to the owners in each backward pass, in fp32."""
    passes = passes_of(config.train.global_batch_size, config.train.micro_batch_size, cluster.ranks)
    each, hosts, e = cluster.ranks_per_host, cluster.hosts, element_bytes(config)
    inside, between = cluster.ranks * (each - 1) / each, hosts - 1
    reduce = Wire(inside * 4 * shape.parameters, between * 4 * shape.parameters)
    if ranks_a_copy(config, cluster) == 1:
        return reduce * passes + Wire(inside * e * shape.parameters, between * e * shape.parameters)
    looked_up_again = replace(shape, lookup_only=0)  # in backward, which the embedding has here
    gathers = _base_gathers(shape, config, cluster, gathers_a_pass(looked_up_again, config.deepspeed.zero))
    persistent = ring(e * shape.persistent, range(cluster.ranks), each)  # once a step: they have changed
    return (reduce + gathers) * passes + persistent


def wire_by_phase(shape: Shape, config: Config, cluster: Cluster) -> dict[str, Wire]:
    """Bytes sent by all ranks together, of one start and of one optimizer step."""
    if config.train.mode == "full":
        return {"step": _step_of_all(shape, config, cluster)}
    shape = shape.frozen
    found: dict[str, Wire] = {}
    ranks, each = cluster.ranks, cluster.ranks_per_host
    zero = config.deepspeed.zero
    costs = [float(target.m * target.n) for target in shape.targets]
    groups = ownership.split(costs, config.init.layer_groups)
    gradient, broadcast = Wire(), Wire()
    if config.init.takes_gradient:
        passes = parts_of_batch(config) * passes_of_init(config, cluster)
    for group in groups:
        owners = ownership.assign([costs[i] for i in group], ranks)
        if config.init.takes_gradient:
            times = gathers_a_pass(shape, zero, share_below(shape, group))
            gradient += _base_gathers(shape, config, cluster, times * passes)
        for i, owner in zip(group, owners, strict=True):
            target = shape.targets[i]
            if config.init.takes_gradient:
                gradient += _to_owner(4 * target.m * target.n, owner, cluster) * passes
            broadcast += _from_owner(4 * target.pair, owner, cluster)
    if config.init.takes_gradient:
        found["gradient"] = gradient
    if config.init.method == "pissa":
        found["gather weights"] = _base_gathers(shape, config, cluster, 1.0)
    found["broadcast"] = broadcast
    share = make_layout(shape.targets, ranks).share + shape.rows_share(ranks)
    inside = ranks * (each - 1) / each
    between = ranks * (cluster.hosts - 1) / cluster.hosts
    e = element_bytes(config)
    reduce = Wire(inside * 4 * share * ranks, between * 4 * share * cluster.hosts)
    gather = Wire(inside * e * share * ranks, between * e * share * cluster.hosts)
    micro_batches = passes_of(config.train.global_batch_size, config.train.micro_batch_size, ranks)
    times = micro_batches * gathers_a_pass(shape, zero)
    found["step"] = _base_gathers(shape, config, cluster, times) + reduce + gather
    return found
