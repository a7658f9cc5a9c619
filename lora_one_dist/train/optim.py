"""AdamW or SGD on LoRA pairs, preconditioned where asked, sharded by layer.

In: adapters (the same on every rank), their gradients as backward makes them.  Out: the updated adapters on every
rank.  The pure maths come first, batched over k layers of one shape; :class:`LayerShardedOptimizer` puts the
communication around them.  A layer's whole pair (A, B) has one owner rank, so the preconditioner sees both, and the
owner alone keeps fp32 masters and moments.

One step, all ranks together:

1. accumulate      during backward each gradient is added to its place in one flat fp32 send buffer, ordered by owner
2. reduce_scatter  the sum over ranks of each owner's part arrives at the owner, in a fixed order of adding
3. clip            by the raw gradient's global norm: one number from each rank, with which others travel
4. update          the owner preconditions and takes the step on its masters
5. all_gather      the working copies (bf16 or fp32) go to every rank; the adapters are views of what arrives

Bytes per rank, P adapter parameters: 4 P send buffer, w P working copies (w bytes each), and of the share P /
world_size 4 received gradient, 4 masters, 8 moments (AdamW) and w for the send of step 5; step 2 takes 4 P / L for a
moment on L ranks a host, and step 4 its result, 4 bytes per element of the largest block, with fp64 copies of at most
24 CHUNK bytes or those of one layer.  Steps 2 and 5 go inside the host first (:mod:`hierarchy`): of H hosts each sends
(4 P + w P) (H - 1) / H bytes a step to the others, whatever its number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_one_dist.adapters.lora import Adapter
from lora_one_dist.adapters.tables import TrainedTable
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm, hierarchy, ownership
from lora_one_dist.config.optim import OptimConfig
from lora_one_dist.initialise import spectral
from lora_one_dist.train.rows import RowShardedTables
from lora_one_dist.train.updates import adamw_, move_to_main_grad, sgd_

FAINTEST = 1e-3  # the least share of its peak that a rate has for the damping: the first step of a warm-up has none
TINY = 1e-30  # in place of a mean eigenvalue or a norm that is zero
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # adapter elements preconditioned at once: what a cache holds; few kernels


class OptimizerError(RuntimeError):
    """An adapter's gradient is missing or zero, or a preconditioner cannot be factorised."""


class NonFiniteError(OptimizerError):
    """Gradients that are not finite; ``layers`` names them as lora_A or lora_B of a target.  The same on all ranks."""

    def __init__(self, layers: Sequence[str], step: int):
        self.layers = list(layers)
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        super().__init__(f"gradient of {', '.join(layers[:3])}{more} is not finite at step {step}. Lower optim.lr.")


def precondition(
    A: torch.Tensor,
    B: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    damping: float,
    rescale: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B'B + damping I)^-1 grad_A`` and ``grad_B (AA' + damping I)^-1``, both from the values before the step.

    A, grad_A (k, r, n); B, grad_B (k, m, r); returns fp32 of the same shapes.  Grams, their inverses and the products
    with them are fp64: with damping 1e-6 the fp32 Gram of a near-singular B is wrong by 1e-2 to 1.

    Args:
        rescale: each result keeps the Frobenius norm of its gradient, and ``damping`` is in units of its Gram's mean
            eigenvalue: what AdamW's moments remember stays comparable while the pair grows.

    Raises:
        OptimizerError: if a damped Gram is not positive definite (damping below fp64 rounding of a huge Gram).

    Source: arXiv 2402.02347, equation 5; arXiv 2502.01235, algorithm 1.  rescale: results/defaults.
    """
    new_A, new_B = torch.empty_like(grad_A, dtype=torch.float32), torch.empty_like(grad_B, dtype=torch.float32)
    layers = max(1, CHUNK[A.device.type] // (A[0].numel() + B[0].numel()))
    stacks = (tensor.split(layers) for tensor in (A, B, grad_A, grad_B, new_A, new_B))
    failed = []
    for A_i, B_i, grad_A_i, grad_B_i, new_A_i, new_B_i in zip(*stacks, strict=True):
        A64, B64 = A_i.double(), B_i.double()
        inverse_B, failed_B = _damped_inverse(B64.mT @ B64, damping, rescale)
        inverse_A, failed_A = _damped_inverse(A64 @ A64.mT, damping, rescale)
        new_A_i.copy_(inverse_B @ grad_A_i.double())
        new_B_i.copy_(grad_B_i.double() @ inverse_A)
        if rescale:
            _give_norm_of(grad_A_i, new_A_i)
            _give_norm_of(grad_B_i, new_B_i)
        failed += [failed_A, failed_B]
    if bool(torch.cat(failed).any()):  # asked once: a GPU would be waited for each time
        raise OptimizerError(f"optim.damping = {damping:g}: B'B + damping I is not positive definite. Raise it.")
    return new_A, new_B


def _damped_inverse(gram: torch.Tensor, damping: float, relative: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of r x r matrices, and which have none: a product with it takes half the time of solving for each column."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Plain LoRA's first B is zero, and so is what its inverse would multiply.
    diagonal.add_(damping * diagonal.mean(-1, keepdim=True).clamp(min=TINY) if relative else damping)
    factor, info = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_inverse(factor), info


def _give_norm_of(grad: torch.Tensor, new: torch.Tensor) -> None:
    """Scale ``new`` to the norm of ``grad``, matrix by matrix, in place; zero where that is zero."""
    wanted, found = (torch.linalg.matrix_norm(t, keepdim=True, dtype=torch.float64) for t in (grad, new))
    new.mul_(wanted / found.clamp(min=TINY))


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


def damping_at(lr: float, config: OptimConfig) -> float:
    """The preconditioner's damping at a rate.  Pure; only where there is a preconditioner.

    Of rescaled it grows as the rate falls: the last steps, mostly noise, are AdamW's own (results/defaults).
    """
    damping = config.damping_in_force
    assert damping is not None
    return damping / max(lr / config.lr, FAINTEST) if config.form == "rescaled" else damping


@dataclass(frozen=True)
class Block:
    """The k targets of one m, n and r that one rank owns: their A side by side in the flat buffers, then their B."""

    owner: int
    """Slot of the owner rank (:func:`hierarchy.slot`)."""
    targets: tuple[int, ...]
    m: int
    n: int
    r: int
    start: int
    """Offset of the block inside its owner's share."""

    def split(self, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (k, r, n) and (k, m, r) of this block in its owner's share: stacked for one bmm, no copy."""
        k, r = len(self.targets), self.r
        middle, end = self.start + k * r * self.n, self.start + k * r * (self.m + self.n)
        return share[self.start : middle].view(k, r, self.n), share[middle:end].view(k, self.m, r)


@dataclass(frozen=True)
class Layout:
    """Where each target's pair lies in a flat tensor of ``world_size * share`` elements, owners one after another."""

    blocks: tuple[Block, ...]
    share: int

    def views(self, flat: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Per target index its A (r, n) and B (m, r) inside a flat tensor of all shares."""
        found = {}
        for block in self.blocks:
            A, B = block.split(flat[block.owner * self.share : (block.owner + 1) * self.share])
            found.update({target: (A[i], B[i]) for i, target in enumerate(block.targets)})
        return found


def make_layout(targets: Sequence[Target], world_size: int) -> Layout:
    """Owners balanced by layers' r (m + n); shares padded to the largest, since gloo refuses uneven ones.  Pure."""
    owners = ownership.assign([float(target.adapter) for target in targets], world_size)
    blocks, share = [], 1
    for owner in range(world_size):
        start = 0
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for i, target in enumerate(targets):
            if owners[i] == owner:
                by_shape.setdefault((target.m, target.n, target.r), []).append(i)
        for (m, n, r), members in sorted(by_shape.items()):
            blocks.append(Block(owner, tuple(members), m, n, r, start))
            start += len(members) * r * (m + n)
        share = max(share, start)
    return Layout(tuple(blocks), share)


def _exact_sum(values: Iterable[float]) -> float:
    """Rounded once; what is not finite stays so."""
    terms = list(values)
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


class LayerShardedOptimizer:
    """The optimizer of all adapters, and of trained tables beside them (:mod:`lora_one_dist.train.rows`).

    Construct, ``reduce`` and ``update`` on every rank, with equal adapters on all.

    From construction on each adapter parameter is a view of one flat working buffer, and its ``main_grad``, to which
    backward adds (:mod:`lora_one_dist.adapters.branch`), one of the flat fp32 send buffer.
    """

    def __init__(self, adapters: Sequence[Adapter], config: OptimConfig, tables: Sequence[TrainedTable] = ()):
        self.config = config
        self.tables = RowShardedTables(tables, config)
        self.names = [adapter.target.name for adapter in adapters]
        first = adapters[0].A
        self.layout = make_layout([a.target for a in adapters], comm.world_size())
        size = self.layout.share * comm.world_size()
        self.working = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.send = torch.zeros(size, dtype=torch.float32, device=first.device)
        self.parameters: dict[tuple[int, str], Any] = {}
        sends = self.layout.views(self.send)
        for i, (working_A, working_B) in self.layout.views(self.working).items():
            parameter: Any
            for side, parameter, working, send in (
                ("A", adapters[i].A, working_A, sends[i][0]),
                ("B", adapters[i].B, working_B, sends[i][1]),
            ):
                self.parameters[i, side] = parameter
                working.copy_(parameter.detach())
                parameter.data = working
                parameter.main_grad = send
                parameter.grad_added_to_main_grad = False
                parameter.register_post_accumulate_grad_hook(move_to_main_grad)
        own = slice(hierarchy.slot() * self.layout.share, (hierarchy.slot() + 1) * self.layout.share)
        self.own_working = self.working[own]
        self.masters = self.own_working.float()
        adamw = config.name == "adamw"
        self.first = torch.zeros_like(self.masters) if adamw else None
        self.second = torch.zeros_like(self.masters) if adamw else None
        self.grads: torch.Tensor | None = None
        self.steps = 0
        self.checked = False

    @torch.no_grad()
    def reduce(self, *carried: float) -> tuple[float, list[tuple[float, ...]]]:
        """Sum the gradients of all ranks at their owners.  Collective: the only one of a step for numbers on the host.

        Args:
            carried: other numbers of this rank that all shall know.

        Returns:
            Global norm of the raw gradient, not finite if any of it is not; and by rank what each carried.
        """
        self.grads = hierarchy.reduce_scatter(self.send)
        self.send.zero_()
        square = spectral.frobenius_norm(self.grads) ** 2 + self.tables.reduce()
        rows = comm.all_gather_rows([*carried, square])
        # The sum is exact: who owns what must not change the last bit.
        return math.sqrt(_exact_sum(row[-1] for row in rows)), [row[:-1] for row in rows]

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
        limit = self.config.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0  # 1e-6 as torch.clip_grad_norm_
        if limit > 0:
            grads.mul_(clip)
        self.steps += 1
        self._update(grads, lr)
        self._share()
        self.tables.update(self.steps, lr, clip)
        for parameter in self.parameters.values():
            parameter.grad_added_to_main_grad = False

    def take_non_finite(self) -> list[str]:
        """Names of this rank's own gradients so far that are not finite; forgets all so far.  Not collective."""
        named = [
            f"lora_{side} of {self.names[i]}"
            for i, pair in sorted(self.layout.views(self.send).items())
            for side, grad in zip("AB", pair, strict=True)
            if not bool(grad.isfinite().all())
        ]
        self.send.zero_()
        return named + self.tables.take_non_finite()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's fp32 masters and moments by name, as views; all ranks' are the whole.  Not collective."""
        return {
            f"{self.names[i]}.lora_{side}.{kind}": tensor
            for kind, flat in self._kinds()
            for block in self._own_blocks()
            for side, stacked in zip("AB", block.split(flat), strict=True)
            for i, tensor in zip(block.targets, stacked, strict=True)
        } | self.tables.state()

    def _kinds(self) -> list[tuple[str, torch.Tensor]]:
        """What is kept of each parameter, by the names that torch's AdamW has for it."""
        kinds = (("master", self.masters), ("exp_avg", self.first), ("exp_avg_sq", self.second))
        return [(kind, flat) for kind, flat in kinds if flat is not None]

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
            A, B = block.split(self.masters)
            pair = block.split(grads)
            if config.damping_in_force is not None:
                pair = precondition(A, B, *pair, damping_at(lr, config), config.form == "rescaled")
            for side, (parameter, grad) in enumerate(zip((A, B), pair, strict=True)):
                rate = lr * (config.lr_ratio_b if side else 1.0)
                if self.first is None or self.second is None:
                    sgd_(parameter, grad, rate, config.weight_decay)
                    continue
                first = block.split(self.first)[side]
                second = block.split(self.second)[side]
                adamw_(
                    parameter,
                    grad,
                    first,
                    second,
                    self.steps,
                    rate,
                    config.betas,
                    config.eps,
                    config.weight_decay,
                )

    def _name_non_finite(self, grads: torch.Tensor) -> list[str]:
        return [
            f"lora_{side} of {self.names[i]}"
            for block in self._own_blocks()
            for side, stacked in zip("AB", block.split(grads), strict=True)
            for i, grad in zip(block.targets, stacked, strict=True)
            if not bool(grad.isfinite().all())
        ] + self.tables.non_finite()

    def _check_first(self, grads: torch.Tensor) -> None:
        for i, name in enumerate(self.names):
            for side in "AB":
                if not self.parameters[i, side].grad_added_to_main_grad:
                    raise OptimizerError(f"lora_{side} of {name} got no gradient in backward: it would never train.")
        for name in self.tables.without_gradient():
            raise OptimizerError(f"{name} got no gradient in backward: it would never train.")
        for block in self._own_blocks():
            values = block.split(self.masters)
            for side, stacked, partners in zip("AB", block.split(grads), values[::-1], strict=True):
                for i, grad, partner in zip(block.targets, stacked, partners, strict=True):
                    if not bool(grad.any()) and bool(partner.any()):
                        raise OptimizerError(
                            f"gradient of lora_{side} of {self.names[i]} is zero though its partner is not: it would "
                            "never train. Check that the layer runs and that the batch has target tokens."
                        )
