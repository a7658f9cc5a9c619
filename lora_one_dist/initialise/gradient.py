"""The one-step full gradient G = dL/dW of every target, each on its owner rank, with no weight gradient anywhere.

In: the frozen base, a few weighted micro-batches, an owner map.  Out: on each owner, ``{name: G (m, n) fp32}``.
All weights stay frozen.  On each target one hook passes the input through an autograd function that saves it (so both
kinds of gradient checkpointing recompute it instead of holding it), another asks autograd for the output's gradient and
forms ``G = dY^T X``, which leaves for the owner at once while backward goes on.  Blocks below the first target take
part in the forward pass alone: of K layer groups the passes back are (K + 1) / 2 whole ones, not K.

Runs on every rank, every rank the same number of micro-batches.  Peak bytes per rank: :mod:`lora_one_dist.plan.memory`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lora_one_dist.base.blocks import blocks, has_encoder, parts, stacks
from lora_one_dist.base.dropout import dropout_off
from lora_one_dist.base.graph import begin_graph, followed
from lora_one_dist.base.loss import loss_sum
from lora_one_dist.base.products import weight_gradient
from lora_one_dist.base.sharding import Base
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.data import batches as batches_module

IN_FLIGHT = 2  # reductions that may be under way at once: hides the wire behind the next layer's backward


class GradientError(RuntimeError):
    """The gradient of a layer did not come in a micro-batch, or is zero or not finite."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of this rank: collated tensors, and the weight of its summed token losses (0 for padding)."""

    tensors: dict[str, torch.Tensor]
    weight: float


def deal_micro_batches(
    samples: Sequence[dict[str, Any]], micro_batch_size: int, average: str, parts: int, pad_token_id: int
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of the init batch, in at most ``parts`` consecutive parts.  Not collective.

    With ``average`` micro_batch a part ends where a micro-batch does, so that the mean does not depend on the parts.
    The weights are such that the sum over parts, ranks and micro-batches of ``weight * summed loss`` is the batch's
    loss: the mean over its target tokens (``average`` token), or the mean of the micro-batches' means (micro_batch).
    Where the samples do not divide, a rank runs a copy of the first sample with weight 0.
    """
    unit = micro_batch_size if average == "micro_batch" else 1
    units = -(-len(samples) // unit)
    cuts = sorted({min(len(samples), units * part // parts * unit) for part in range(parts + 1)})
    return deal_between(samples, cuts, micro_batch_size, average, pad_token_id)


def deal_between(
    samples: Sequence[dict[str, Any]], cuts: Sequence[int], micro_batch_size: int, average: str, pad_token_id: int
) -> list[list[MicroBatch]]:
    """As :func:`deal_micro_batches`, in parts from one of ``cuts`` to the next, which rise from 0."""
    starts = [range(low, high, micro_batch_size) for low, high in pairwise(cuts)]
    num_micro_batches = sum(len(part) for part in starts)
    all_targets = sum(map(num_targets, samples))
    dealt = []
    for low, high in pairwise(cuts):
        part = samples[low:high]
        batches = []
        for positions in batches_module.deal(len(part), micro_batch_size, comm.world_size(), comm.rank()):
            chosen = [part[i] for i in positions] or [samples[0]]
            tensors = batches_module.collate(chosen, pad_token_id, weightless=not positions)
            own_targets = sum(map(num_targets, chosen))
            if not positions or own_targets == 0:
                weight = 0.0
            elif average == "token":
                weight = 1.0 / all_targets
            else:
                weight = 1.0 / (num_micro_batches * own_targets)
            batches.append(MicroBatch(tensors, weight))
        dealt.append(batches)
    return dealt


def num_targets(sample: dict[str, Any]) -> int:
    """Tokens of a sample that carry a loss."""
    return int(sum(label != -100 for label in sample["labels"][1:]))  # of packed rows NumPy's


class _SaveInput(torch.autograd.Function):
    """Identity on a linear layer's input X that saves it.

    Before the layer's product and not behind it: a recomputation ends with the last tensor that was saved.
    """

    @staticmethod
    def forward(ctx: Any, layer_input: torch.Tensor, anchor: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(layer_input)
        return layer_input.view_as(layer_input)

    @staticmethod
    def backward(ctx: Any, *grad_input: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_input[0], None


class _OwnerSums:
    """Reduces each gradient to its owner, at most IN_FLIGHT at a time, and sums there over micro-batches.

    An owner adds its own gradient to its sum first and reduces into that, unless its sums are on the host.
    """

    def __init__(self, owners: dict[str, int], buffer_device: torch.device, owned: dict[str, torch.Tensor]):
        self.owners = owners
        self.buffer_device = buffer_device
        self.on_host = buffer_device != comm.device()
        self.owned = owned
        self.pending: deque[tuple[str, torch.Tensor, comm.Waitable]] = deque()
        self.fired: set[str] = set()

    def sink(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def take(grad_output: torch.Tensor, layer_input: torch.Tensor) -> None:
            # A layer that is called several times: its sum must not change while it is on its way.
            while len(self.pending) >= IN_FLIGHT or any(name == other for other, _, _ in self.pending):
                self._finish_one()
            G = weight_gradient(grad_output, layer_input, None if self.on_host else self.owned.get(name))
            if self.owners[name] == comm.rank() and not self.on_host:
                self.owned[name] = G
            self.pending.append((name, G, comm.reduce_to(G, self.owners[name])))
            self.fired.add(name)

        return take

    def _finish_one(self) -> None:
        name, G, work = self.pending.popleft()
        work.wait()
        if self.owners[name] != comm.rank() or not self.on_host:
            return
        if name in self.owned:
            self.owned[name] += G.to(self.buffer_device)
        else:
            self.owned[name] = G.to(self.buffer_device)

    def end_micro_batch(self) -> None:
        while self.pending:
            self._finish_one()
        idle = [name for name in self.owners if name not in self.fired]
        if idle:
            raise GradientError(
                f"{len(idle)} target layers have no part in the loss of a forward pass, e.g. {idle[0]}. Leave such "
                "layers out of lora.target_modules."
            )
        self.fired.clear()


def full_gradient(
    base: Base,
    targets: Sequence[Target],
    owners: Sequence[int],
    micro_batches: Sequence[MicroBatch],
    buffer: str,
    progress: Callable[[], None] = lambda: None,
    onto: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient of the weighted loss with respect to each target's weight, on its owner.  Collective.

    Of a layer that a forward pass calls several times the sum over its calls, on all ranks as many.

    Args:
        base: the frozen model, without adapters.  owners: rank of each target.  buffer: device or host.
        micro_batches: of this rank; all ranks must have the same number.
        onto: what an earlier call returned, to be added to in place; a new sum if not given.

    Returns:
        ``{name: G (m, n) fp32}`` of the targets this rank owns, and the loss (the same on all ranks).

    Raises:
        GradientError: if a target had no part in the loss of a micro-batch.

    Source: arXiv 2502.01235, "one-step full gradient"; arXiv 2407.05000, section 3.
    """
    buffer_device = torch.device("cpu") if buffer == "host" else comm.device()
    owner_of = {target.name: owner for target, owner in zip(targets, owners, strict=True)}
    sums = _OwnerSums(owner_of, buffer_device, {} if onto is None else onto)
    loss = torch.zeros((), dtype=torch.float64)
    layers = {name: base.module.get_submodule(name) for name in sums.owners}
    head_is_target = base.module.get_output_embeddings() in layers.values()
    with _hooks(layers, sums), _backward_down_to(base.module, set(layers.values())), dropout_off(base.module):
        for micro_batch in micro_batches:
            weighted = loss_sum(base.module, micro_batch.tensors, micro_batch.weight, head_is_target)
            weighted.backward()
            sums.end_micro_batch()
            base.release()
            loss += weighted.detach().double().cpu()
            del weighted
            progress()
    base.release_all()
    return sums.owned, float(comm.all_sum(loss))


@contextlib.contextmanager
def _hooks(layers: Mapping[str, nn.Module], sums: _OwnerSums) -> Iterator[None]:
    """Forward hooks on the targets for the length of a block."""
    handles = [layer.register_forward_pre_hook(_save_input) for layer in layers.values()]
    handles += [layer.register_forward_hook(_capture_hook(sums.sink(name))) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _backward_down_to(module: Any, layers: Set[nn.Module]) -> Iterator[None]:
    """Let backward end at the first transformer block that holds one of the layers: the blocks below keep nothing.

    transformers' hooks on the embedding start autograd's graph there; these start it at the block's input instead.
    Layers that do not all lie in one stack of blocks, or in an encoder's and its decoder's, leave it at the embedding.
    """
    below = _below(module, layers)
    if not below:
        yield
        return
    was_on = [getattr(block, "gradient_checkpointing", False) for block in below]
    if has_encoder(module):
        handles = _begin_above(module, below)
    else:
        handles = [
            module.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: output.detach()),
            below[-1].register_forward_hook(_start_graph),
        ]
    try:
        for block in below:
            block.gradient_checkpointing = False  # without a graph there is nothing to recompute
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, on in zip(below, was_on, strict=True):
            block.gradient_checkpointing = on


def _below(module: Any, layers: Set[nn.Module]) -> list[Any]:
    """The blocks that a forward pass runs before the first that holds one of the layers."""
    if has_encoder(module):
        sequences = [[block for part in parts(module) for block in blocks(part)]]
    else:
        sequences = [list(stack) for stack in stacks(module)]
    sequence = next((s for s in sequences if layers <= {m for block in s for m in block.modules()}), [])
    return list(takewhile(lambda block: not layers & set(block.modules()), sequence))


def _begin_above(module: Any, below: Sequence[nn.Module]) -> list[Any]:
    """Hooks that let no graph into these blocks of an encoder and its decoder, and begin one above those of each.

    Where none of the encoder's blocks is left it begins at their end, for the decoder's layers that read it.
    """
    handles = [block.register_forward_pre_hook(_without_graph, with_kwargs=True) for block in below]
    for part in parts(module):
        last = [block for block in blocks(part) if block in below][-1:]
        handles += [block.register_forward_hook(_start_graph) for block in last]
    return handles


def _without_graph(block: nn.Module, inputs: Any, settings: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.detach, (inputs, settings))


def _start_graph(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
    begin_graph(output if isinstance(output, torch.Tensor) else output[0])


def _save_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """An input outside the graph, as of a second call on positions alone, has a part in the gradient too."""
    begins = torch.is_grad_enabled() and not inputs[0].requires_grad
    return _SaveInput.apply(inputs[0], torch.empty(0, requires_grad=True) if begins else None)


def _capture_hook(sink: Callable[..., None]) -> Callable[..., torch.Tensor]:
    """On the output itself, so that a model's own code may go on to write to it (Falcon adds its residual in place)."""

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        saved: Any = inputs[0].grad_fn
        if output.requires_grad:
            output = followed(output)
            output.register_hook(lambda grad_output: sink(grad_output, *saved.saved_tensors))
        return output

    return hook
