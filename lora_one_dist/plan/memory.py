"""Bytes of a rank in each phase, term by term; tools/bench/phases.py holds them against measurements.

A phase with passes has two full moments, of which the fuller one is told: under the output ``head``, where the logits
are, and where ``backward`` begins; and where a rank's gradients are whole only at the end of backward, that one too.

- ``base``         e P / S on the device (under ``offload_param`` in host memory: 0 here)
- ``persistent``   e times the parameters of which ZeRO-3 keeps a second, whole copy
- ``largest_tensor``  of the load: e times it, while it is cut; ``staging``: SLAB_BYTES on their way to a GPU
- ``gathered``     e :func:`gathered`: what ZeRO-3 holds whole at that moment (0 on one rank or under stage 0)
- ``owned``        4 sum(m n) over the fullest owner's targets of a layer group, for each part of the batch; 0 if
                   ``init.buffer`` is host
- ``in_flight``    4 IN_FLIGHT max(m n): gradients on their way to their owner (0 on one rank), in backward
- ``upcast``       4 T max(m + n) if e < 4: dY and X in fp32, where there is no mixed product (0 on a GPU), in backward
- ``block_inputs`` e T h for each block that is computed again
- ``activations``  T :func:`kept_by_block` for each that is not
- ``head``         2 e T h; at the moment of the head the logits of a few rows (:func:`logits_bytes`), in backward
                   AROUND_NORM T h
- ``krylov``       the largest owned layer's SVD (:mod:`lora_one_dist.initialise.spectral`)
- ``pairs``        4 sum(r (m + n)): the adapters to be, on every rank from the broadcast on
- ``moments of weights``  8 sum(m n) of the owner that has most of them, of LoRA-Pro under AdamW
- ``frozen pairs``  w sum(r (m + n)) while training, of LoRA-SB
- ``compensated pairs``  4 sum(r (m + n)) more while training, for the methods that change the base
- ``adapters``     (e + 4) p: working copies and send buffer;  ``states``: 16 p / R at the owner, 24 of AdaLoRA
- ``gradients``, ``states``  where every weight is trained: 4 P / R and, with AdamW, 12 P / R at their owners;
                   ``reduced``: in backward the gradient of one parameter, and what is sent and received of it
- ``tables``         the same of trained rows of embedding and head, but e p until they train;  ``table states``;
                   ``table update``: what is sent of one table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_one_dist.base.head import LOSS_BYTES
from lora_one_dist.base.recompute import blocks_asked
from lora_one_dist.base.sharding import REUSE_DISTANCE, SLAB_BYTES, with_fetch_sizes
from lora_one_dist.base.tables import Table
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster.hierarchy import EXCHANGE_BYTES
from lora_one_dist.config.initialise import COMPENSATED_METHODS
from lora_one_dist.config.settings import Config
from lora_one_dist.initialise.gradient import IN_FLIGHT
from lora_one_dist.initialise.pairs import singular_vectors_needed
from lora_one_dist.initialise.spectral import FULL_BLOCKS, krylov_width
from lora_one_dist.plan.shape import (
    Cluster,
    Shape,
    element_bytes,
    fullest_owner,
    parts_of_batch,
    passes_of_init,
    ranks_a_copy,
    tokens_of,
)
from lora_one_dist.train.layout import make_layout

AROUND_NORM = 18  # bytes: the last norm's backward is in fp32 (measured)
BLOCKS_EXPECTED = 6  # of a Krylov space; real gradients take 3 to 8


def kept_gathered(shape: Shape, zero: Mapping[str, Any]) -> int:
    """Elements that ZeRO-3 keeps from forward to backward: ``stage3_max_reuse_distance`` of them (measured)."""
    return min(shape.parameters, int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)))


def gathered(shape: Shape, zero: Mapping[str, Any]) -> tuple[int, int]:
    """Elements that ZeRO-3 holds whole: under the head, and where backward begins.

    What it keeps for reuse, what is at work, and what it fetches ahead of that; and in backward still the head, which
    was fetched together with a part of the last block and is let go with it (measured).
    """
    zero = with_fetch_sizes(zero, shape.largest_block)
    kept, head = kept_gathered(shape, zero), shape.vocabulary * shape.hidden
    if shape.trained_head is not None and shape.trained_head.whole:
        head = 0
    bucket, live = int(zero["stage3_prefetch_bucket_size"]), int(zero["stage3_max_live_parameters"])

    def with_ahead(whole: int) -> int:
        return whole + min(bucket, max(0, live - whole))

    most = shape.parameters
    return min(most, with_ahead(kept + head)), min(most, with_ahead(max(kept, shape.largest_block)) + head)


def _loss_bytes(cluster: Cluster) -> int:
    return LOSS_BYTES["cuda" if cluster.backend == "nccl" else "cpu"]


def logits_bytes(shape: Shape, config: Config, cluster: Cluster, tokens: int) -> int:
    """Of the rows whose loss is taken at one time: scores in fp32; in bf16 beside them logits and their gradient."""
    return min(_loss_bytes(cluster), 4 * tokens * shape.vocabulary) * (2 if element_bytes(config) < 4 else 1)


def all_logits_bytes(table: Table, config: Config, cluster: Cluster, tokens: int) -> int:
    """Of a head of which rows are trained: all logits, which become their gradient, and in bf16 a few in fp32, or a few
    rows of the head's gradient.

    Of tokens that the base has rows for, a copy of the gradient without them goes to the base's product.
    """
    e = element_bytes(config)
    most = 4 * max(tokens * table.rows, table.trained * max(tokens, table.width))
    pieces = min(_loss_bytes(cluster), most) if e < 4 else 0
    copied = e * tokens * table.old if not table.whole and table.new[0] < table.old else 0
    return e * tokens * table.rows + max(pieces, copied)


@dataclass(frozen=True)
class _Moment:
    """Of a phase with passes: what is there beside what the blocks keep."""

    terms: Mapping[str, int]
    whole: bool = True
    """Do all blocks still keep it, or the first alone?"""


def memory_by_phase(shape: Shape, config: Config, cluster: Cluster) -> dict[str, dict[str, int]]:
    """Bytes by phase and term: those of this file's docstring."""
    return memory_and_recomputed(shape, config, cluster)[0]


def memory_and_recomputed(
    shape: Shape, config: Config, cluster: Cluster
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Bytes by phase and term, and how many blocks backward computes again in the phases that have one."""
    if config.train.mode == "full":
        return _where_all_is_trained(shape, config, cluster)
    e, on_gpu = element_bytes(config), cluster.backend == "nccl"
    several = _gathers(config, cluster)
    base = {
        "base": 0 if config.deepspeed.offloads and on_gpu else e * (shape.parameters // ranks_a_copy(config, cluster))
    }
    if config.deepspeed.stage == 3:
        base["persistent"] = e * shape.persistent if several else 0
    largest = e * shape.largest_tensor if several else 0
    found = {"load": base | {"largest_tensor": largest, "staging": SLAB_BYTES if on_gpu else 0}}
    if shape.tables:
        found["load"] |= _while_tables_start(shape, config, cluster, largest)
        held = e * (shape.frozen.parameters // ranks_a_copy(config, cluster))
        base |= {"tables": e * sum(table.size for table in shape.tables), "base": min(base["base"], held)}
        shape = shape.frozen
    recomputed: dict[str, int] = {}
    pairs = 4 * shape.pairs
    if config.init.takes_gradient:
        moments = _gradient_moments(shape, config, cluster, base)
        found["gradient"], recomputed["gradient"] = _with_blocks(shape, config, cluster, "gradient", moments)
    if config.init.takes_svd:
        owned, largest_owned = fullest_owner(shape, config, cluster)
        on_host = config.init.buffer == "host" and on_gpu  # of them one at a time is on the device
        held = 4 * parts_of_batch(config) * (max(t.m * t.n for t in shape.targets) if on_host else owned)
        needed = [(target, singular_vectors_needed(config.init, target.r)) for target in largest_owned]
        krylov = max((krylov_bytes(target, count) for target, count in needed), default=0)
        found["svd"] = base | {"owned": held, "krylov": krylov, "pairs": pairs // cluster.ranks}
        found["broadcast"] = base | {"pairs": 2 * pairs}
    layout = make_layout(shape.targets, cluster.ranks)
    p, kept = layout.share * cluster.ranks, 24 if config.lora.kind == "adalora" else 16
    if config.optim.moments_of_weights:
        kept = 8
    states = {"adapters": (e + 4) * p, "states": kept * p // cluster.ranks}
    if config.optim.moments_of_weights:
        states["moments of weights"] = 8 * layout.largest_sum([target.m * target.n for target in shape.targets])
    if config.lora.kind == "lora_sb":
        states["frozen pairs"] = e * shape.pairs
    if config.init.method in COMPENSATED_METHODS:
        states["compensated pairs"] = pairs
    states, extra = states | _states_of_tables(shape, config, cluster), _moments_of_tables(shape, config, cluster)
    moments = [_Moment(base | states | terms) for terms in _pass_moments(shape, config, cluster, "step")]
    moments += [_Moment(base | states | terms, whole=False) for terms in extra]
    found["step"], recomputed["step"] = _with_blocks(shape, config, cluster, "step", moments)
    return found, recomputed


def _where_all_is_trained(
    shape: Shape, config: Config, cluster: Cluster
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """As :func:`memory_and_recomputed`."""
    e, ranks, several = element_bytes(config), cluster.ranks, _gathers(config, cluster)
    base = {"base": e * (shape.parameters // ranks_a_copy(config, cluster))}
    if config.deepspeed.stage == 3:
        base["persistent"] = e * shape.persistent if several else 0
    largest = e * shape.largest_tensor if several else 0
    load = base | {"largest_tensor": largest, "staging": SLAB_BYTES if cluster.backend == "nccl" else 0}
    held = 4 * shape.parameters // ranks
    states = {"gradients": held, "states": held * (3 if config.optim.name == "adamw" else 1)}
    tokens = tokens_of("step", config)
    logits = e * tokens * shape.vocabulary + (min(_loss_bytes(cluster), 4 * tokens * shape.vocabulary) if e < 4 else 0)
    ends, around_norm = 2 * e * tokens * shape.hidden, AROUND_NORM * tokens * shape.hidden
    elements = gathered(shape, config.deepspeed.zero) if several else (0, 0)
    of_head = shape.vocabulary * shape.hidden
    head = {"gathered": e * elements[0], "head": ends + logits + around_norm, "reduced": _reduced(of_head, e, ranks)}
    end = {"gathered": e * elements[1], "reduced": _reduced(shape.largest_tensor, e, ranks)}
    moments = [_Moment({**base, **states, **head}), _Moment({**base, **states, **end}, whole=False)]
    step, count = _with_blocks(shape, config, cluster, "step", moments)
    return {"load": load, "step": step}, {"step": count}


def _reduced(elements: int, e: int, ranks: int) -> int:
    """Of a parameter's gradient on its way to its owners: itself, in fp32, and what has arrived."""
    if ranks == 1:
        return e * elements
    sent = 4 * elements if e < 4 else 0
    return e * elements + sent + 4 * elements // ranks + 5 * min(EXCHANGE_BYTES, 4 * elements) // 2


def _while_tables_start(shape: Shape, config: Config, cluster: Cluster, largest: int) -> dict[str, int]:
    """Behind the load: the tables, the last whole one gathered beside them; where that is more than the load."""
    e = element_bytes(config)
    taken = [e * table.old * table.width for table in shape.tables if table.whole]
    gathered = taken[-1] - sum(taken[:-1]) // ranks_a_copy(config, cluster) if taken else 0
    tables = e * sum(table.size for table in shape.tables)
    return {"tables": tables, "largest_tensor": max(0, gathered)} if tables + gathered > largest else {}


def _states_of_tables(shape: Shape, config: Config, cluster: Cluster) -> dict[str, int]:
    """While they train."""
    share = shape.rows_share(cluster.ranks)
    held = {"tables": (element_bytes(config) + 4) * share * cluster.ranks, "table states": 16 * share}
    return held if shape.tables else {}


def _moments_of_tables(shape: Shape, config: Config, cluster: Cluster) -> list[dict[str, int]]:
    """Behind backward, while what was received of a table is summed and its rows are sent."""
    if not shape.tables:
        return []
    e, largest = element_bytes(config), max(table.size for table in shape.tables)
    received = 3 * min(EXCHANGE_BYTES, 4 * largest) // 2 if cluster.ranks > 1 else 0
    return [{"table update": max(received, e * largest // cluster.ranks)}]


def _gathers(config: Config, cluster: Cluster) -> bool:
    """Does ZeRO-3 make whole copies?  On one rank that holds all it makes views."""
    offloaded = config.deepspeed.offloads and cluster.backend == "nccl"
    return config.deepspeed.stage == 3 and (ranks_a_copy(config, cluster) > 1 or offloaded)


def _pass_moments(shape: Shape, config: Config, cluster: Cluster, phase: str) -> list[dict[str, int]]:
    """What a forward and backward pass takes beside the blocks: under the head, and where backward begins."""
    tokens, e = tokens_of(phase, config), element_bytes(config)
    elements = gathered(shape, config.deepspeed.zero) if _gathers(config, cluster) else (0, 0)
    ends, around_norm = 2 * e * tokens * shape.hidden, AROUND_NORM * tokens * shape.hidden
    table = shape.trained_head
    if table is not None and not (table.whole and phase == "gradient"):  # there it is still a frozen head
        logits = all_logits_bytes(table, config, cluster, tokens)
    else:
        logits = logits_bytes(shape, config, cluster, tokens)
    head = {"gathered": e * elements[0], "head": ends + logits}
    return [head, {"gathered": e * elements[1], "head": ends + around_norm}]


def _gradient_moments(shape: Shape, config: Config, cluster: Cluster, base: Mapping[str, int]) -> list[_Moment]:
    """A rank that runs one micro-batch for a part has that part's gradients whole only where backward ends."""
    head, backward = _pass_moments(shape, config, cluster, "gradient")
    on_gpu, parts = cluster.backend == "nccl", parts_of_batch(config)
    host = config.init.buffer == "host" and on_gpu
    owned = 0 if host else 4 * fullest_owner(shape, config, cluster)[0]
    before = owned * (parts if passes_of_init(config, cluster) > 1 else parts - 1)
    largest, widest = max(t.m * t.n for t in shape.targets), max(t.m + t.n for t in shape.targets)
    on_their_way = {
        "in_flight": 4 * IN_FLIGHT * largest if cluster.ranks > 1 or host else 0,
        "upcast": 0 if element_bytes(config) == 4 or on_gpu else 4 * tokens_of("gradient", config) * widest,
    }
    moments = [
        _Moment({**base, "owned": before, **head}),
        _Moment({**base, "owned": before, **on_their_way, **backward}),
    ]
    end = {**base, "owned": parts * owned, **on_their_way, "gathered": backward["gathered"]}
    return moments if before == parts * owned else [*moments, _Moment(end, whole=False)]


def _with_blocks(
    shape: Shape, config: Config, cluster: Cluster, phase: str, moments: list[_Moment]
) -> tuple[dict[str, int], int]:
    """The terms of the fullest moment, and how many blocks are computed again.

    As ``model.recompute`` says; auto: the fewest with which all moments fit.
    """

    def fullest(count: int) -> dict[str, int]:
        with_blocks = ({**m.terms, **_kept(shape, config, phase, count, m.whole)} for m in moments)
        return max(with_blocks, key=lambda terms: sum(terms.values()))

    most = shape.recomputable
    if config.model.recompute != "auto":
        count = blocks_asked(config.model.recompute, most)
    else:
        fitting = (count for count in range(most) if sum(fullest(count).values()) <= cluster.bytes_per_rank)
        count = next(fitting, most)
    return fullest(count), count


def _kept(shape: Shape, config: Config, phase: str, recomputed: int, whole: bool) -> dict[str, int]:
    """What blocks keep for backward: all of them, or the first alone."""
    inputs, activations = (recomputed, shape.layers - recomputed) if whole else (min(1, recomputed), 1)
    tokens = tokens_of(phase, config)
    return {
        "block_inputs": element_bytes(config) * tokens * shape.hidden * inputs,
        "activations": tokens * kept_by_block(shape, config) * activations,
    }


def kept_by_block(shape: Shape, config: Config) -> int:
    """Bytes a token that a block keeps for backward, its input included.

    Norms keep their input (bf16: in fp32) and what follows them; attention queries, keys, values and output; the
    feed-forward network four tensors.  Measured on Llamas within 3 %.  A mask, which packed rows have but for flash
    attention, makes keys and values as wide as queries.
    """
    e, attention = element_bytes(config), shape.attention
    masked = config.data.packing and attention in ("eager", "sdpa")
    keys = shape.queries if masked else shape.keys
    kept = shape.norms * (4 + e if e < 4 else 2 * e) + e * (2 * shape.queries + 2 * keys + 4 * shape.intermediate)
    if config.lora.kind == "dora":  # rows before they are scaled
        kept += e * sum(target.m for target in shape.targets) // max(1, shape.layers)
    if attention == "eager":
        kept += (4 + (e if e < 4 else 0)) * shape.heads * config.data.max_length
    return kept


def krylov_bytes(target: Target, r: int) -> int:
    """Of one SVD: bases of both sides and their images, or of a full one."""
    width = krylov_width(r)
    if min(target.m, target.n) <= FULL_BLOCKS * width:
        return 4 * (target.m + target.n) * min(target.m, target.n)
    return 4 * BLOCKS_EXPECTED * width * (3 * target.m + 3 * target.n)


def host_bytes(shape: Shape, config: Config, cluster: Cluster) -> int:
    """What offload and host buffers take of a host's memory beside what the ranks' processes do."""
    size = 0
    if config.deepspeed.offloads:
        size += element_bytes(config) * (shape.parameters // ranks_a_copy(config, cluster))
    if config.init.buffer == "host" and config.init.takes_svd:
        size += 4 * parts_of_batch(config) * fullest_owner(shape, config, cluster)[0]
    return size * cluster.ranks_per_host
