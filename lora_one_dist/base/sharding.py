"""The only user of ``deepspeed``: where the frozen base weights live.

In: a model without values (or a function that loads one), and a ZeRO JSON (memory policy only).  Out: a :class:`Base`,
which is the plain module under stage 0 (every rank holds every weight), or a module whose parameters ZeRO-3 partitions
over the ranks and gathers layer by layer.  The base is frozen, so no DeepSpeed optimizer ever sees it.

A transformer block is gathered and released as a whole (unless it alone exceeds ``stage3_max_live_parameters``):
DeepSpeed's hooks around every inner module cost a fifth of a forward and backward pass, and its record of a pass takes
time in the square of the modules it follows.  DeepSpeed fetches ahead only when a module begins, so where the ZeRO JSON
leaves it open it fetches a whole block ahead (:func:`with_fetch_sizes`): less would leave the rest of the next block's
gathering without work to hide behind.

Memory per rank, stage 3: ``bytes(base) / ranks that share a copy``, plus the blocks gathered at one time, plus a
second, whole copy of the parameters below ``stage3_param_persistence_threshold``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from lora_one_dist.base.blocks import blocks
from lora_one_dist.cluster import comm
from lora_one_dist.disk.weights import Part, Scales, TensorSource, WeightsError

# DeepSpeed picks its accelerator when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
if not torch.cuda.is_available():
    # deepspeed.init_distributed compiles a C++ shared-memory all-reduce on a CPU (minutes, and a killed build leaves
    # a lock on which every later run waits). gloo serves; deepspeed 0.19 asks this table before it builds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
_all_parameters = coordinator.get_all_parameters


def _partitioned_parameters(module: nn.Module, recurse: bool = False) -> list[tuple[str, Any]]:
    """DeepSpeed's list of what it gathers for a module, without the adapters, which it does not hold."""
    return [(name, param) for name, param in _all_parameters(module, recurse) if hasattr(param, "ds_id")]


coordinator.get_all_parameters = _partitioned_parameters
REUSE_DISTANCE = 10**9  # DeepSpeed's default of stage3_max_reuse_distance
LIVE_BLOCKS = 2  # the one at work and the one fetched ahead; without a limit backward fetches two for each
SLAB_BYTES = 16 * 2**20  # of one tensor worked on at a time while loading or compensating
MEAN_ELEMENT = 32  # bytes that an element of a mean counts for: smaller slabs, as they are copied to fp64


class _UnfilledInit(deepspeed.zero.Init):
    """``zero.Init`` that leaves each new partition unfilled.

    The stock one broadcasts every tensor from rank 0 to give all ranks the same random values; ours are read from the
    checkpoint a moment later, so the broadcast would only move ``bytes(base)`` over the network and touch whole
    tensors in host memory.
    """

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


@dataclass
class Base:
    """The frozen model, and the DeepSpeed engine that partitions it (None under stage 0)."""

    module: Any
    copies: int
    """How often the ranks together hold the base: once, once a host, or once a rank."""
    engine: Any = None
    depth: int = 0
    """Of DeepSpeed's stack of modules at work, between passes."""

    @property
    def partitioned(self) -> bool:
        """Does ZeRO-3 partition the base?"""
        return self.engine is not None

    def release(self) -> None:
        """Partition what a backward pass left gathered.  Call after each one.  Not collective.

        DeepSpeed releases a layer when the gradient of its input is known, and the first layers' inputs need none.
        """
        if self.engine is not None:
            self.engine.optimizer.release_backward_leftovers()
            # transformers 5.17 recomputes inside DeepSpeed's hooks, and where that ends early some are never left.
            del parameter_offload.FWD_MODULE_STACK[self.depth :]

    def release_all(self) -> None:
        """Partition everything, also what is kept for reuse or was fetched for a pass that ended early."""
        if self.engine is not None:
            self.engine.optimizer.partition_all_parameters()

    @contextlib.contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Hold the whole of these parameters for the block, to read.  Collective under stage 3."""
        if self.engine is None:
            yield
            return
        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield

    def forget(self, parameter: Any) -> None:
        """Free what this rank holds of a parameter that no module has any more: DeepSpeed keeps a list of all."""
        if self.engine is not None:
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


def accelerator() -> str:
    """The one that DeepSpeed has picked: cuda or cpu.  Not collective."""
    return deepspeed.accelerator.get_accelerator()._name


def deepspeed_config(policy: dict[str, Any], dtype: str, micro_batch_size: int) -> dict[str, Any]:
    """The ZeRO JSON with what the run's config decides: precision and micro-batch.  Pure."""
    # DeepSpeed's "memory efficient" linear saves every input for a weight gradient that a frozen base never has.
    # Gathering tensor by tensor needs no flat buffer, nor copies into it and out of it.
    fixed = {"memory_efficient_linear": False, "stage3_allgather_sequential": True}
    zero = {**fixed, **policy.get("zero_optimization", {})}
    return {
        **policy,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "bf16": {"enabled": dtype == "bf16"},
        "steps_per_print": 2**31 - 1,
    }


def start_deepspeed() -> None:
    """Let DeepSpeed use the process group of ``comm.init``.  Collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(verbose=False)


def load_slices(
    skeleton: nn.Module,
    sources: Mapping[str, Sequence[Part]],
    device: torch.device,
    ds_config: dict | None,
    shard_group: str,
    progress: Callable[[int, int], None],
) -> Base:
    """Give each rank its own slice (stage 3) or all (``ds_config`` None) of every tensor, read from the files.

    No rank reads or holds more than its own partitions, one slab of rows at a time.  Collective under stage 3.

    Args:
        skeleton: model with parameters on the meta device and real buffers.
        sources: where each tensor's values lie, by name.
        shard_group: under stage 3, ``world`` or ``node``: the ranks that share one copy of the base.
        progress: told how many tensors of how many are done.
    """
    init = None
    if ds_config is not None:
        init = _UnfilledInit(config_dict_or_path=ds_config, data_parallel_group=comm.shard_group(shard_group))
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied names share one parameter
    num_parameters = len(list(skeleton.parameters()))
    with comm.all_or_none("reading the base"), contextlib.ExitStack() as stack, torch.no_grad():
        held = [source for parts in sources.values() for part in parts for source in part.sources]
        paths = {source.path for source in held}
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        for prefix, module in skeleton.named_modules():
            for key, meta in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{key}" if prefix else key
                if name in sources and meta not in filled:
                    param = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=False)
                    if init is not None:
                        init._convert_to_zero_parameters([param])
                    _read_own(param, sources[name], files)
                    filled[meta] = param
                    progress(len(filled), num_parameters)
        for module in skeleton.modules():
            for key, meta in list(module.named_parameters(recurse=False)):
                module.register_parameter(key, filled[meta])
            for key, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[key] = buffer.to(device)
        for name, buffer in skeleton.named_buffers():
            if name in sources:
                _read_own(buffer, sources[name], files)
    if ds_config is None:
        return Base(skeleton, copies=comm.world_size())
    return _initialize(skeleton, ds_config, comm.num_hosts() if shard_group == "node" else 1)


def load_pretrained(build: Callable[[], nn.Module], ds_config: dict | None) -> Base:
    """The road for checkpoints whose names do not map one to one: ``build`` is ``from_pretrained``.  Collective.

    Under stage 3 global rank 0 reads the whole model into host memory and broadcasts it, a tensor at a time.
    """
    if ds_config is None:
        return Base(build().requires_grad_(False), copies=comm.world_size())
    keep_alive = HfDeepSpeedConfig(ds_config)  # from_pretrained finds it by weak reference
    base = _initialize(build(), ds_config, copies=1)
    del keep_alive
    return base


def _initialize(model: nn.Module, ds_config: dict[str, Any], copies: int) -> Base:
    stack = [(block, sum(parameter.ds_numel for parameter in _parameters(block))) for block in blocks(model)]
    zero = with_fetch_sizes(ds_config["zero_optimization"], max((size for _, size in stack), default=0))
    ds_config = {**ds_config, "zero_optimization": zero}
    for block, size in stack:
        set_z3_leaf_module(block, size <= zero["stage3_max_live_parameters"])
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=ds_config)
    _forget_with_the_trace(engine.optimizer.get_param_coordinator())
    return Base(engine.module, copies, engine, len(parameter_offload.FWD_MODULE_STACK))


def _forget_with_the_trace(coordinator: Any) -> None:
    """Let DeepSpeed find again what to release when the order of a pass is another than recorded.

    It remembers it by layer and place in the order alone: an evaluation, which has no backward, would have training
    release in forward what backward needs, whatever stage3_max_reuse_distance says.
    """
    stock = coordinator._clear_trace_structures
    to_release: Any = coordinator._PartitionedParameterCoordinator__params_to_release.__func__
    around = [to_release, *(cell.cell_contents for cell in to_release.__closure__ or ())]
    caches = [part for part in around if hasattr(part, "cache_clear")]

    def clear() -> None:
        stock()
        for cache in caches:
            cache.cache_clear()

    coordinator._clear_trace_structures = clear


def _parameters(module: nn.Module) -> list[Any]:
    return list(module.parameters())


def with_fetch_sizes(zero: Mapping[str, Any], largest_block: int) -> dict[str, Any]:
    """``zero_optimization`` and what it leaves open, in elements, for a model with blocks of so many.  Pure."""
    kept = int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE))
    return {
        "stage3_prefetch_bucket_size": largest_block,
        "stage3_max_live_parameters": kept + LIVE_BLOCKS * largest_block,
        **zero,
    }


def own_range(param: Any) -> tuple[torch.Tensor, int]:
    """The flat elements that this rank holds of a parameter, without padding, and the index of the first."""
    if not hasattr(param, "ds_tensor"):
        return param.data.view(-1), 0
    start = param.ds_tensor.ds_numel * param.ds_zero_partition_rank
    return param.ds_tensor.data[: max(0, param.ds_numel - start)], start


def _slabs(start: int, stop: int, row: int, element_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut flat elements [start, stop) of a matrix with ``row`` columns into slabs of whole rows.

    Yields (top, bottom, first, last): rows [top, bottom) cover the flat elements [first, last).
    """
    if start >= stop:
        return
    rows_per_slab = max(1, SLAB_BYTES // (row * element_size))
    end = -(-stop // row)
    for top in range(start // row, end, rows_per_slab):
        bottom = min(top + rows_per_slab, end)
        yield top, bottom, max(start, top * row), min(stop, bottom * row)


def _read_own(param: Any, parts: Sequence[Part], files: Mapping[Path, BinaryIO]) -> None:
    """Fill what this rank holds of a parameter: its own bytes of the files and no others, a slab at a time."""
    own, start = own_range(param)
    for part in parts:
        first, last = max(start, part.at), min(start + own.numel(), part.at + part.count)
        if first < last:
            skipped = part.start + first - part.at
            if part.scales is None:
                _read_run(own[first - start : last - start], part.source, skipped, files[part.source.path])
            else:
                _read_scaled(own[first - start : last - start], part.source, skipped, part.scales, files)


def _read_run(own: torch.Tensor, source: TensorSource, skipped: int, file: BinaryIO) -> None:
    """Fill a flat tensor with successive elements of a source, from the one numbered ``skipped``."""
    in_place = own.device.type == "cpu" and own.dtype == source.dtype
    assert source.dtype is not None, f"{source}: refused by sources.find_sources"
    size = source.dtype.itemsize
    file.seek(source.offset + skipped * size)
    for slab in own.split(SLAB_BYTES // size):
        target = slab if in_place else torch.empty(slab.numel(), dtype=source.dtype)
        view: Any = target.view(torch.uint8).numpy()
        if file.readinto(view) != view.nbytes:  # type: ignore[attr-defined]
            raise WeightsError(f"{file.name}: ended early; it changed after its header was read.")
        if not in_place:
            slab.copy_(target)


def _read_scaled(
    own: torch.Tensor, source: TensorSource, skipped: int, scales: Scales, files: Mapping[Path, BinaryIO]
) -> None:
    """As :func:`_read_run`, of 8-bit values times their scales: in fp32, rounded once; a row of blocks at a time."""
    factors = torch.empty(scales.source.shape, dtype=scales.source.dtype)
    _read_run(factors.view(-1), scales.source, 0, files[scales.source.path])
    n, first, stop = source.shape[1], skipped, skipped + own.numel()
    assert source.dtype is not None, f"{source}: refused by sources.find_sources"
    size = scales.rows * n  # of a row of blocks
    held, values = torch.empty(size, dtype=source.dtype), torch.zeros(scales.rows, n)
    for block in range(first // size, -(-stop // size)):
        low, high = max(first, block * size), min(stop, (block + 1) * size)
        inside = slice(low - block * size, high - block * size)
        _read_run(held[inside], source, low, files[source.path])
        values.view(-1)[inside].copy_(held[inside])
        values *= factors[block].float().repeat_interleave(scales.columns)[:n]
        own[low - first : high - first].copy_(values.view(-1)[inside])


def add_low_rank(weight: Any, B: torch.Tensor, A: torch.Tensor, scale: float) -> float:
    """``W <- W + scale * B A`` on whatever this rank holds of W, rounded once to W's dtype.  Not collective.

    Args:
        weight: base weight (m, n), partitioned or whole; gathered only if it is a persistent parameter.
        B: (m, r).  A: (r, n).  scale: dimensionless.

    Returns:
        sum of squares of ``W_rounded - (W + scale B A)`` over the elements that this rank holds.
    """
    own, start = own_range(weight)
    squared_error = _add_rows(own, start, B, A, scale)
    gathered = hasattr(weight, "ds_tensor") and weight.ds_status == ZeroParamStatus.AVAILABLE
    if gathered and weight.data_ptr() != own.data_ptr():  # on one rank DeepSpeed "gathers" by making a view
        _add_rows(weight.data.view(-1), 0, B, A, scale)  # a persistent parameter's second, whole copy
    return squared_error


def _add_rows(flat: torch.Tensor, start: int, B: torch.Tensor, A: torch.Tensor, scale: float) -> float:
    """Add elements [start, start + len(flat)) of the flattened ``scale * B A``."""
    B, A = B.to(flat.device, torch.float32), A.to(flat.device, torch.float32)
    n, squared_error = A.shape[1], 0.0
    for top, bottom, first, last in _slabs(start, start + flat.numel(), n, A.element_size()):
        part = flat[first - start : last - start]
        exact = part.float() + scale * (B[top:bottom] @ A).reshape(-1)[first - top * n : last - top * n]
        part.copy_(exact)
        squared_error += float((part.float() - exact).double().square().sum())
    return squared_error


def mean_row(base: Base, weight: Any, count: int, width: int) -> torch.Tensor:
    """Mean of the first ``count`` rows of a table (rows, width), fp64, each rank adding what it holds.  Collective."""
    own, start = own_range(weight)
    total = torch.zeros(width, dtype=torch.float64)
    for top, bottom, first, last in _slabs(start, min(start + own.numel(), count * width), width, MEAN_ELEMENT):
        rows = torch.zeros((bottom - top) * width, dtype=torch.float64)
        rows[first - top * width : last - top * width].copy_(own[first - start : last - start])
        total += rows.view(-1, width).sum(0)
    return comm.all_sum(total) / (count * base.copies)


def row_norms(base: Base, weight: Any, B: torch.Tensor, A: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Norms (m,) of the rows of ``W + B A``, fp64, each rank adding what it holds of it.  Collective.

    Args:
        weight: base weight (m, n), or (n, m) if ``transposed``.  B: (m, r), its scale within.  A: (r, n).
    """
    left, right = (A.T.float(), B.T.float()) if transposed else (B.float(), A.float())
    rows, columns = left.shape[0], right.shape[1]
    total = torch.zeros(columns if transposed else rows, dtype=torch.float64)
    own, start = own_range(weight)
    for top, bottom, first, last in _slabs(start, start + own.numel(), columns, MEAN_ELEMENT):
        slab = torch.zeros((bottom - top) * columns, dtype=torch.float64, device=own.device)
        inside = slice(first - top * columns, last - top * columns)
        slab[inside] = own[first - start : last - start].double()
        slab[inside] += (left[top:bottom].to(own.device) @ right.to(own.device)).view(-1)[inside]
        squares = slab.view(-1, columns).square().cpu()
        if transposed:
            total += squares.sum(0)
        else:
            total[top:bottom] += squares.sum(1)
    return (comm.all_sum(total) / base.copies).sqrt()
