"""AdamW or SGD on LoRA pairs, preconditioned where asked, sharded by layer.

In: adapters (the same on every rank), their gradients as backward makes them.  Out: the updated adapters on every
rank.  The pure maths (:mod:`precondition`, :mod:`updates`) are batched over k layers of one shape;
:class:`LayerShardedOptimizer` puts the communication around them.  A layer's whole pair (A, B) has one owner rank
(:mod:`layout`), so the preconditioner sees both, and the owner alone keeps fp32 masters and moments.

One step, all ranks together:

1. accumulate      during backward each gradient is added to its place in one flat fp32 send buffer, ordered by owner
2. reduce_scatter  the sum over ranks of each owner's part arrives at the owner, in a fixed order of adding
3. clip            by the raw gradient's global norm: one number from each rank, with which others travel
4. update          the owner preconditions and takes the step on its masters
   AdaLoRA's also prunes: what it gathers for that is a number of each triplet (:mod:`adalora`)
5. all_gather      the working copies (bf16 or fp32) go to every rank; the adapters are views of what arrives

Bytes per rank, P adapter parameters: 4 P send buffer, w P working copies (w bytes each), and of the share P /
world_size 4 received gradient, 4 masters, 8 moments (AdamW), 8 averages (AdaLoRA) and w for the send of step 5; step 2
takes 4 P / L for a moment on L ranks a host, and step 4 its result, 4 bytes per element of the largest block, with fp64
copies of at most 24 CHUNK bytes or those of one layer.  Steps 2 and 5 go inside the host first (:mod:`hierarchy`): of
H hosts each sends (4 P + w P) (H - 1) / H bytes a step to the others, whatever its number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from lora_one_dist.adapters.lora import Adapter
from lora_one_dist.adapters.tables import TrainedTable
from lora_one_dist.cluster import comm, hierarchy
from lora_one_dist.config.optim import PAIR_KINDS, OptimConfig
from lora_one_dist.initialise import spectral
from lora_one_dist.train import adalora, lora_pro
from lora_one_dist.train.layout import Block, make_layout
from lora_one_dist.train.precondition import damping_at, precondition
from lora_one_dist.train.rows import RowShardedTables
from lora_one_dist.train.updates import OptimizerError, adamw_, clip_factor, move_to_main_grad, sgd_


class NonFiniteError(OptimizerError):
    """Gradients that are not finite; ``layers`` names them, e.g. as lora_A of a target.  The same on all ranks."""

    def __init__(self, layers: Sequence[str], step: int):
        self.layers = list(layers)
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        super().__init__(f"gradient of {', '.join(layers[:3])}{more} is not finite at step {step}. Lower optim.lr.")


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up from 0, then the schedule down to 0 at total_steps."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * max(0.0, 1 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr


def exact_sum(values: Iterable[float]) -> float:
    """Rounded once; what is not finite stays so."""
    terms = list(values)
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


class LayerShardedOptimizer:
    """The optimizer of all adapters, and of trained tables beside them (:mod:`lora_one_dist.train.rows`).

    Construct, ``reduce`` and ``update`` on every rank, with equal adapters on all.

    From construction on each adapter parameter is a view of one flat working buffer, and its ``main_grad``, to which
    backward adds (:mod:`lora_one_dist.adapters.branch`), one of the flat fp32 send buffer.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        config: OptimConfig,
        tables: Sequence[TrainedTable] = (),
        allocation: adalora.Allocation | None = None,
    ):
        """
        Args:
            allocation: of AdaLoRA's triplets.
        """
        self.config, self.allocation = config, allocation
        self.tables = RowShardedTables(tables, config)
        self.names = [adapter.target.name for adapter in adapters]
        first = adapters[0].A
        self.preconditions = config.damping_in_force is not None and adapters[0].target.kind in PAIR_KINDS
        self.layout = make_layout([a.target for a in adapters], comm.world_size())
        size = self.layout.share * comm.world_size()
        self.working = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.send = torch.zeros(size, dtype=torch.float32, device=first.device)
        self.parameters: dict[tuple[int, str], Any] = {}
        sends = self.layout.views(self.send)
        for i, views in self.layout.views(self.working).items():
            for name, working in views.items():
                parameter: Any = adapters[i].trained[name]
                self.parameters[i, name] = parameter
                working.copy_(parameter.detach())
                parameter.data, parameter.main_grad = working, sends[i][name]
                parameter.grad_added_to_main_grad = False
                parameter.register_post_accumulate_grad_hook(move_to_main_grad)
        own = slice(hierarchy.slot() * self.layout.share, (hierarchy.slot() + 1) * self.layout.share)
        self.own_working = self.working[own]
        self.masters = self.own_working.float()
        adamw = config.name == "adamw" and not config.moments_of_weights
        self.first = torch.zeros_like(self.masters) if adamw else None
        self.second = torch.zeros_like(self.masters) if adamw else None
        self.averages = tuple(torch.zeros_like(self.masters) for _ in ("sensitivity", "uncertainty") if allocation)
        self.scalings = torch.tensor([a.target.scaling for a in adapters], dtype=torch.float64, device=first.device)
        self.pro: dict[int, lora_pro.Moments] = {}
        if config.moments_of_weights:
            self.pro = {block.start: self._moments_of(block) for block in self._own_blocks()}
        self.grads: torch.Tensor | None = None
        self.steps = 0
        self.checked = False

    @torch.no_grad()
    def reduce(self, *carried: float) -> tuple[float, list[tuple[float, ...]]]:
        """Sum the gradients of all ranks at their owners.  Collective: the only one of a step for numbers on the host.

        Args:
            carried: other numbers of this rank that all shall know.

        Returns:
            Global norm of the raw gradient, with that of AdaLoRA's regulariser, not finite if any of it is not; and by
            rank what each carried.
        """
        self.grads = hierarchy.reduce_scatter(self.send)
        self.send.zero_()
        if self.allocation is not None:
            weight = self.allocation.orthogonal / (2 * len(self.names))
            for block in self._own_blocks():
                adalora.add_orthogonal_gradient(block.split(self.masters), block.split(self.grads), weight)
        square = spectral.frobenius_norm(self.grads) ** 2 + self.tables.reduce()
        rows = comm.all_gather_rows([*carried, square])
        # The sum is exact: who owns what must not change the last bit.
        return math.sqrt(exact_sum(row[-1] for row in rows)), [row[:-1] for row in rows]

    @torch.no_grad()
    def update(self, lr: float, norm: float) -> None:
        """Clip, precondition, step, share.  Collective.

        Args:
            lr: of lora_A; lora_B's is ``lr_ratio_b`` times it.  norm: from :meth:`reduce`.

        Raises:
            NonFiniteError: on all ranks, naming the layers; nothing was updated.
            RankError: on all ranks, naming the layer, if in the first step with lr > 0 a gradient is missing, or zero
                where its partner is not.
        """
        grads, self.grads = self.grads, None
        assert grads is not None, "reduce comes first"
        if not math.isfinite(norm):
            # An fp64 norm of finite fp32 elements cannot overflow: some element is not finite.
            named = comm.all_gather_object(self._name_non_finite(grads))
            raise NonFiniteError([name for names in named for name in names], self.steps + 1)
        if lr > 0 and not self.checked:
            with comm.all_or_none("checking the first gradient"):
                self._check_first(grads)
            self.checked = True
        clip = clip_factor(norm, self.config.max_grad_norm)
        if clip < 1:
            grads.mul_(clip)
        self.steps += 1
        self._update(grads, lr)
        if self.allocation is not None:
            self._prune(self.allocation, grads)
        self._share()
        self.tables.update(self.steps, lr, clip)
        for parameter in self.parameters.values():
            parameter.grad_added_to_main_grad = False

    def take_non_finite(self) -> list[str]:
        """Names of this rank's own gradients so far that are not finite; forgets all so far.  Not collective."""
        named = [
            f"{name} of {self.names[i]}"
            for i, grads in sorted(self.layout.views(self.send).items())
            for name, grad in grads.items()
            if not bool(grad.isfinite().all())
        ]
        self.send.zero_()
        return named + self.tables.take_non_finite()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's fp32 masters and moments by name, as views; all ranks' are the whole.  Not collective."""
        found = {
            f"{self.names[i]}.{name}.{kind}": tensor
            for kind, flat in self._kinds()
            for block in self._own_blocks()
            for name, stacked in block.split(flat).items()
            for i, tensor in zip(block.targets, stacked, strict=True)
        }
        of_weights = {
            f"{self.names[i]}.weight.{kind}": tensor
            for block in self._own_blocks()
            if block.start in self.pro
            for kind, stacked in self.pro[block.start].kinds.items()
            for i, tensor in zip(block.targets, stacked, strict=True)
        }
        return found | of_weights | self.tables.state()

    def _kinds(self) -> list[tuple[str, torch.Tensor]]:
        """What is kept of each parameter, by the names that torch's AdamW and PEFT's AdaLoRA have for it."""
        kinds = (("master", self.masters), ("exp_avg", self.first), ("exp_avg_sq", self.second))
        averages = zip(("exp_avg_ipt", "exp_avg_unc"), self.averages, strict=False)
        return [*((kind, flat) for kind, flat in kinds if flat is not None), *averages]

    @torch.no_grad()
    def resume(self, steps: int) -> None:
        """Go on after ``steps`` steps, now that :meth:`state` was filled: share the working copies.  Collective."""
        self.steps, self.checked = steps, steps > 0
        self._share()
        self.tables.share()

    def _share(self) -> None:
        self.own_working.copy_(self.masters)
        hierarchy.all_gather(self.working, self.own_working.clone())

    def _own_blocks(self) -> Iterator[Block]:
        return (block for block in self.layout.blocks if block.owner == hierarchy.slot())

    def _update(self, grads: torch.Tensor, lr: float) -> None:
        config = self.config
        for block in self._own_blocks():
            values, turned = block.split(self.masters), block.split(grads)
            if self.preconditions:
                pair = self._turn(block, values, turned, damping_at(lr, config))
                turned |= dict(zip(("lora_A", "lora_B"), pair, strict=True))
            for name, value in values.items():
                rate = lr * (config.lr_ratio_b if name == "lora_B" else 1.0)
                if self.first is None or self.second is None:
                    sgd_(value, turned[name], rate, config.weight_decay)
                    continue
                moments = block.split(self.first)[name], block.split(self.second)[name]
                adamw_(value, turned[name], *moments, self.steps, rate, config.betas, config.eps, config.weight_decay)

    def _prune(self, allocation: adalora.Allocation, grads: torch.Tensor) -> None:
        """Set E of the triplets that go to 0.  From ``allocation.last`` on importances stay, and so do those that go.

        Collective in the steps that prune.
        """
        if self.steps < allocation.last:
            adalora.follow(self.masters, grads, *self.averages)
        left = allocation.left(self.steps)
        if left is None:
            return
        blocks = list(self._own_blocks())
        found = [adalora.importance(*(block.split(average) for average in self.averages)) for block in blocks]
        own = [value for scores in found for value in scores.flatten().tolist()]
        most = adalora.threshold(chain(*comm.all_gather_object(own)), allocation.initial - left)
        for block, scores in zip(blocks, found, strict=True):
            block.split(self.masters)["lora_E"].masked_fill_(scores <= most, 0.0)

    def _turn(
        self, block: Block, values: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], damping: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of a block's pairs, preconditioned."""
        config = self.config
        (A, B), (gA, gB) = ((held["lora_A"], held["lora_B"]) for held in (values, grads))
        if config.form != "lora_pro":
            return precondition(A, B, gA, gB, damping, config.form == "rescaled")
        s = self.scalings[list(block.targets)].view(-1, 1, 1)
        if block.start in self.pro:
            return self.pro[block.start].turn((A, B), (gA, gB), s, damping, self.steps, config.betas, config.eps)
        dA, dB = lora_pro.adjusted(A, B, gA, gB, s, damping)
        return dA.float(), dB.float()

    def _moments_of(self, block: Block) -> lora_pro.Moments:
        shapes = dict(block.shapes)
        return lora_pro.Moments(len(block.targets), shapes["lora_B"][0], shapes["lora_A"][1], self.masters.device)

    def _name_non_finite(self, grads: torch.Tensor) -> list[str]:
        return [
            f"{name} of {self.names[i]}"
            for block in self._own_blocks()
            for name, stacked in block.split(grads).items()
            for i, grad in zip(block.targets, stacked, strict=True)
            if not bool(grad.isfinite().all())
        ] + self.tables.non_finite()

    def _check_first(self, grads: torch.Tensor) -> None:
        for (i, name), parameter in self.parameters.items():
            if not parameter.grad_added_to_main_grad:
                raise OptimizerError(f"{name} of {self.names[i]} got no gradient in backward: it would never train.")
        for name in self.tables.without_gradient():
            raise OptimizerError(f"{name} got no gradient in backward: it would never train.")
        for block in self._own_blocks():
            values = block.split(self.masters)
            for name, stacked in block.split(grads).items():
                for k, (i, grad) in enumerate(zip(block.targets, stacked, strict=True)):
                    partners = [value[k] for other, value in values.items() if other != name]
                    if not bool(grad.any()) and all(bool(partner.any()) for partner in partners):
                        raise OptimizerError(
                            f"gradient of {name} of {self.names[i]} is zero though its partner is not: it would "
                            "never train. Check that the layer runs and that the batch has target tokens."
                        )
