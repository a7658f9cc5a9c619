"""AdamW or SGD on every weight of the model, sharded by elements over all ranks: ``train.mode: full``.

In: the base, whole on each rank or partitioned by ZeRO-3, and gradients as autograd makes them.  Out: the same base
with other weights.  Of each parameter's N elements a rank owns ceil(N / R) successive ones, under ZeRO-3 those that it
holds anyway; it alone has their fp32 masters, moments and gradient.

One step, all ranks together:

1. accumulate  when a parameter's gradient is known in backward, and it is whole for a moment, ``reduce_scatter`` takes
               it in fp32 to the owners, who add what arrives; autograd's own is let go at once
2. clip        by the global norm: one number from each rank, with which others travel
3. update      each owner takes the step on its masters
4. share       the owner rounds its masters into its partition, which the next forward pass gathers; where every rank
               holds all weights, ``all_gather`` brings them now

DeepSpeed's own ZeRO-3 optimizer is not used: it divides by the number of ranks where our loss is a sum, sums and clips
in the type of the weights, and saves by rank what here is saved by name, for any number of ranks.  Weight decay is on
all that is trained, as torch's AdamW has it on ``model.parameters()``; transformers' Trainer spares biases and norms.
A parameter that backward does not reach stays as it is, undecayed, as torch's AdamW leaves it.

Bytes per rank beside the weights, P parameters on R ranks: 16 P / R of gradients, masters and moments (AdamW); in
backward the gradient of the parameter at hand, e N, its copy in fp32, 4 N, and what is received of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lora_one_dist.base.sharding import Base, own_range
from lora_one_dist.cluster import comm, hierarchy
from lora_one_dist.config.optim import OptimConfig
from lora_one_dist.initialise import spectral
from lora_one_dist.train.optim import NonFiniteError, exact_sum
from lora_one_dist.train.rows import CHUNK, KINDS
from lora_one_dist.train.updates import OptimizerError, adamw_, clip_factor, sgd_


class _Part:
    """One parameter, and the elements [first, end) of it that this rank owns."""

    def __init__(self, name: str, parameter: Any, rank_at: list[int], adamw: bool):
        """
        Args:
            rank_at: by slot of the collectives, the rank there.
        """
        self.name, self.parameter, self.rank_at = name, parameter, rank_at
        held, start = own_range(parameter)
        self.is_partitioned = hasattr(parameter, "ds_tensor")
        self.count = int(parameter.ds_numel if self.is_partitioned else parameter.numel())
        self.each = -(-self.count // comm.world_size())
        self.first, self.end = (min(self.count, (comm.rank() + i) * self.each) for i in (0, 1))
        if self.is_partitioned:
            where = (start, parameter.ds_tensor.ds_numel, held.numel())
            assert where == (comm.rank() * self.each, self.each, self.end - self.first), f"{name} is at {where}"
        self.masters = self._own().detach().float().clone()
        self.moments = [torch.zeros_like(self.masters) for _ in range(2 if adamw else 0)]
        self.grads = torch.zeros_like(self.masters)
        self.is_reached = False

    def _own(self) -> torch.Tensor:
        """What the model has of this rank's elements; where it is elsewhere changes from pass to pass."""
        held, _ = own_range(self.parameter)
        return held if self.is_partitioned else held[self.first : self.end]

    def add(self, grad: torch.Tensor) -> None:
        """Add the sum over ranks of a whole gradient to what its owners have.  Collective."""
        self.is_reached = True
        if comm.world_size() == 1:
            self.grads.add_(grad.reshape(-1))
            return
        send = grad.reshape(-1)
        if send.dtype != torch.float32 or self.each * comm.world_size() != self.count:
            send = torch.zeros(comm.world_size() * self.each, dtype=torch.float32, device=grad.device)
            send[: self.count] = grad.reshape(-1)
        if self.rank_at != sorted(self.rank_at):
            send = send.view(comm.world_size(), -1)[self.rank_at].view(-1)
        self.grads.add_(hierarchy.reduce_scatter(send)[: self.grads.numel()])

    def update(self, steps: int, lr: float, clip: float, config: OptimConfig) -> None:
        """Step number ``steps``, counted from 1.  Not collective."""
        kinds = [kind.split(CHUNK) for kind in (self.masters, self.grads.mul_(clip), *self.moments)]
        for master, grad, *moments in zip(*kinds, strict=True):
            if moments:
                adamw_(master, grad, moments[0], moments[1], steps, lr, config.betas, config.eps, config.weight_decay)
            else:
                sgd_(master, grad, lr, config.weight_decay)

    def share(self) -> None:
        """The masters into the model.  Collective where it is whole on every rank."""
        self._own().copy_(self.masters)
        if self.is_partitioned or comm.world_size() == 1:
            return
        own = self.parameter.new_zeros(self.each)
        own[: self.masters.numel()] = self.masters
        whole = self.parameter.new_empty(comm.world_size() * self.each)
        hierarchy.all_gather(whole, own)
        of_rank = whole.view(comm.world_size(), -1)
        if self.rank_at != sorted(self.rank_at):
            of_rank = torch.empty_like(of_rank).index_copy_(0, torch.tensor(self.rank_at, device=whole.device), of_rank)
        self.parameter.view(-1).copy_(of_rank.reshape(-1)[: self.count])

    def forget(self) -> None:
        self.grads.zero_()
        self.is_reached = False


class FullOptimizer:
    """The optimizer of all weights of a base.  Construct on every rank; what is collective says so.

    From construction on backward leaves no ``.grad``, and is collective: ranks run the same layers in the same order.
    """

    def __init__(self, base: Base, config: OptimConfig):
        self.base, self.config, self.steps = base, config, 0
        slots = comm.all_gather_object(hierarchy.slot())
        rank_at = sorted(range(len(slots)), key=lambda rank: slots[rank])
        base.release_all()
        named = base.module.named_parameters()
        self.parts = [_Part(name, parameter, rank_at, config.name == "adamw") for name, parameter in named]
        self.non_finite: list[str] | None = None  # if this rank's own are looked at: in a step that is run again
        for part in self.parts:
            part.parameter.register_post_accumulate_grad_hook(lambda parameter, part=part: self._take(part))

    @torch.no_grad()
    def _take(self, part: _Part) -> None:
        grad, part.parameter.grad = part.parameter.grad, None
        if self.non_finite is not None and not bool(grad.isfinite().all()):
            self.non_finite.append(part.name)
        part.add(grad)

    @torch.no_grad()
    def reduce(self, *carried: float) -> tuple[float, list[tuple[float, ...]]]:
        """The global norm of the raw gradient, and by rank what each ``carried``.  Collective.

        The norm is not finite if any element is not.
        """
        square = sum(spectral.frobenius_norm(part.grads) ** 2 for part in self.parts)
        rows = comm.all_gather_rows([*carried, square])
        return math.sqrt(exact_sum(row[-1] for row in rows)), [row[:-1] for row in rows]

    @torch.no_grad()
    def update(self, lr: float, norm: float) -> None:
        """Clip, step, share.  Collective.

        Args:
            norm: from :meth:`reduce`.

        Raises:
            NonFiniteError: on all ranks, naming the parameters; nothing was updated.
            OptimizerError: on all ranks, if backward has reached no parameter at all.
        """
        if not math.isfinite(norm):
            own = [part.name for part in self.parts if not bool(part.grads.isfinite().all())]
            named = dict.fromkeys(name for names in comm.all_gather_object(own) for name in names)
            raise NonFiniteError(list(named), self.steps + 1)
        reached = [part for part in self.parts if part.is_reached]
        if not reached:
            raise OptimizerError("no weight got a gradient in backward: nothing would train.")
        clip = clip_factor(norm, self.config.max_grad_norm)
        self.steps += 1
        for part in reached:
            part.update(self.steps, lr, clip, self.config)
            part.forget()
        self._share(reached)

    def _share(self, parts: list[_Part]) -> None:
        for part in parts:
            part.share()
        self.base.release_all()  # what was gathered is of before

    def take_non_finite(self) -> list[str]:
        """Names of the parameters whose gradient of this rank's own was not finite since the last call.  Forgets all
        gradients so far.  Not collective."""
        named, self.non_finite = self.non_finite or [], []
        for part in self.parts:
            part.forget()
        return named

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's fp32 masters and moments by name, elements and kind, as views.  Not collective."""
        return {
            f"{part.name}.elements{part.first}-{part.end}.{kind}": tensor
            for part in self.parts
            if part.first < part.end
            for kind, tensor in zip(KINDS, (part.masters, *part.moments), strict=False)
        }

    @torch.no_grad()
    def resume(self, steps: int) -> None:
        """Go on after ``steps`` steps, now that :meth:`state` was filled.  Collective."""
        self.steps = steps
        self._share(self.parts)
