"""Bytes of a rank in each phase, term by term; tools/bench/phases.py holds them against measurements.

- ``base``         e P / S on the device (under ``offload_param`` in host memory: 0 here)
- ``persistent``   e times the parameters of which ZeRO-3 keeps a second, whole copy
- ``largest_tensor``  of the load: e times it, while it is cut; ``staging``: SLAB_BYTES on their way to a GPU
- ``gathered``     e :func:`gathered`: what ZeRO-3 holds whole at one time (0 on one rank or under stage 0)
- ``owned``        4 sum(m n) over the fullest owner's targets of a layer group, for each part of the batch; 0 if
                   ``init.buffer`` is host
- ``in_flight``    4 IN_FLIGHT max(m n): gradients on their way to their owner (0 on one rank)
- ``upcast``       4 T max(m + n) if e < 4: dY and X in fp32, where there is no mixed product (0 on a GPU)
- ``block_inputs`` e T h for each block that is computed again
- ``activations``  T :func:`kept_by_block` for each that is not
- ``head``         2 e T h, and on top whichever is more: AROUND_NORM T h while backward goes through the last norm, or
                   the logits of a few rows in fp32 (LOSS_COPIES LOSS_BYTES)
- ``krylov``       the largest owned layer's SVD (:mod:`lora_one_dist.initialise.spectral`)
- ``pairs``        4 r sum(m + n): the adapters to be, on every rank from the broadcast on
- ``compensated pairs``  4 r sum(m + n) more while training, for the methods that change the base
- ``adapters``     (e + 4) p: working copies and send buffer;  ``states``: 16 p / R at the owner
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lora_one_dist.base.head import LOSS_BYTES
from lora_one_dist.base.recompute import blocks_asked
from lora_one_dist.base.sharding import REUSE_DISTANCE, SLAB_BYTES, with_fetch_sizes
from lora_one_dist.base.targets import Target
from lora_one_dist.config.settings import COMPENSATED_METHODS, GRADIENT_METHODS, Config
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
from lora_one_dist.train.optim import make_layout

AROUND_NORM = 18  # bytes: the last norm's backward is in fp32 (measured)
BLOCKS_EXPECTED = 6  # of a Krylov space; real gradients take 3 to 8
LOSS_COPIES = 3  # of some rows of the logits in fp32, while the loss is taken


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


def memory_by_phase(shape: Shape, config: Config, cluster: Cluster) -> dict[str, dict[str, int]]:
    """Bytes by phase and term: those of this file's docstring."""
    e, sharers = element_bytes(config), ranks_a_copy(config, cluster)
    zero = config.deepspeed.zero
    on_gpu = cluster.backend == "nccl"
    offloaded = config.deepspeed.offloads and on_gpu
    several = config.deepspeed.stage == 3 and (sharers > 1 or offloaded)  # as model.is_partitioned
    base = {"base": 0 if offloaded else e * (shape.parameters // sharers)}
    if config.deepspeed.stage == 3:
        base["persistent"] = e * shape.persistent if several else 0
    first, later = (
        base | {"gathered": e * gathered(shape, zero, recorded) if several else 0} for recorded in (False, True)
    )
    activations = partial(_with_activations, shape, config, cluster)
    staging = SLAB_BYTES if on_gpu else 0
    largest = e * shape.largest_tensor if several else 0
    found = {"load": base | {"largest_tensor": largest, "staging": staging}}
    r = config.lora.r
    pairs = 4 * r * shape.adapter
    if config.init.method in GRADIENT_METHODS:
        terms = first | gradient_terms(shape, config, cluster)
        if several and passes_of_init(config, cluster) == 1:
            terms["gathered"] = _gathered_once(shape, zero, e, terms)
        found["gradient"] = activations("gradient", terms)
    if config.init.method != "lora":
        owned, largest_owned = fullest_owner(shape, config, cluster)
        on_host = config.init.buffer == "host" and on_gpu  # of them one at a time is on the device
        held = 4 * parts_of_batch(config) * (max(t.m * t.n for t in shape.targets) if on_host else owned)
        needed = singular_vectors_needed(config.init.method, r)
        krylov = max((krylov_bytes(target, needed) for target in largest_owned), default=0)
        found["svd"] = base | {"owned": held, "krylov": krylov, "pairs": pairs // cluster.ranks}
        found["broadcast"] = base | {"pairs": 2 * pairs}
    p = make_layout(shape.targets, r, cluster.ranks).share * cluster.ranks
    kept = pairs if config.init.method in COMPENSATED_METHODS else 0
    states = {"adapters": (e + 4) * p, "states": 16 * p // cluster.ranks}
    found["step"] = activations("step", later | states | ({"compensated pairs": kept} if kept else {}))
    return found


def kept_by_block(shape: Shape, config: Config) -> int:
    """Bytes a token that a block keeps for backward, its input included.

    Norms keep their input (bf16: in fp32) and what follows them; attention queries, keys, values and output; the
    feed-forward network four tensors.  Measured on Llamas within 3 %.  A mask, which packed rows have but for flash
    attention, makes keys and values as wide as queries.
    """
    e, attention = element_bytes(config), config.model.attn_implementation
    masked = config.data.packing and attention in ("eager", "sdpa")
    keys = shape.queries if masked else shape.keys
    kept = shape.norms * (4 + e if e < 4 else 2 * e) + e * (2 * shape.queries + 2 * keys + 4 * shape.intermediate)
    if attention == "eager":
        kept += (4 + (e if e < 4 else 0)) * shape.heads * config.data.max_length
    return kept


def recomputed_blocks(shape: Shape, config: Config, cluster: Cluster, phase: str, others: int) -> int:
    """How many blocks are computed again: as ``model.recompute`` says; auto: the fewest that fit beside ``others``."""
    most = max(0, shape.layers - 1)
    asked = config.model.recompute
    if asked != "auto":
        return blocks_asked(asked, most)
    fitting = (
        count
        for count in range(most)
        if others + sum(_activations(shape, config, phase, count, cluster).values()) <= cluster.bytes_per_rank
    )
    return next(fitting, most)


def recomputed_in(phase: str, terms: Mapping[str, int], shape: Shape, config: Config) -> int:
    """The number of blocks behind a phase's ``block_inputs``."""
    return terms["block_inputs"] // (element_bytes(config) * tokens_of(phase, config) * shape.hidden)


def _with_activations(
    shape: Shape, config: Config, cluster: Cluster, phase: str, terms: Mapping[str, int]
) -> dict[str, int]:
    count = recomputed_blocks(shape, config, cluster, phase, sum(terms.values()))
    return {**terms, **_activations(shape, config, phase, count, cluster)}


def _gathered_once(shape: Shape, zero: Mapping[str, Any], e: int, terms: Mapping[str, int]) -> int:
    """Bytes of ``gathered`` where each rank runs one micro-batch.

    The order of a pass is not known yet, so nothing is fetched ahead; and the owner's sums are whole only where
    backward ends, far from the largest tensor.
    """
    at_the_end = e * (kept_gathered(shape, zero) + 2 * shape.largest_block)
    return at_the_end + max(0, 2 * e * shape.largest_tensor - terms["owned"] - terms["in_flight"])


def _activations(shape: Shape, config: Config, phase: str, recomputed: int, cluster: Cluster) -> dict[str, int]:
    e, tokens = element_bytes(config), tokens_of(phase, config)
    limit = LOSS_BYTES["cuda" if cluster.backend == "nccl" else "cpu"]
    logits = LOSS_COPIES * min(limit, 4 * tokens * shape.vocabulary)
    inputs = e * tokens * shape.hidden
    return {
        "block_inputs": inputs * recomputed,
        "activations": tokens * kept_by_block(shape, config) * (shape.layers - recomputed),
        "head": 2 * inputs + max(AROUND_NORM * tokens * shape.hidden, logits),
    }


def gradient_terms(shape: Shape, config: Config, cluster: Cluster) -> dict[str, int]:
    """Of the gradient phase alone, beside the base and the activations."""
    tokens, e, on_gpu = tokens_of("gradient", config), element_bytes(config), cluster.backend == "nccl"
    owned, _ = fullest_owner(shape, config, cluster)
    largest = max(target.m * target.n for target in shape.targets)
    upcast = 0 if e == 4 or on_gpu else 4 * tokens * max(target.m + target.n for target in shape.targets)
    host = config.init.buffer == "host" and on_gpu
    return {
        "owned": 0 if host else 4 * parts_of_batch(config) * owned,
        "in_flight": 4 * IN_FLIGHT * largest if cluster.ranks > 1 or host else 0,
        "upcast": upcast,
    }


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
    if config.init.buffer == "host" and config.init.method != "lora":
        size += 4 * parts_of_batch(config) * fullest_owner(shape, config, cluster)[0]
    return size * cluster.ranks_per_host
