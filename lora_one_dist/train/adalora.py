"""AdaLoRA (arXiv 2303.10512): which triplets (A's row, E's entry, B's column) of ``W + s B diag(E) A`` stay.

In: what an owner has of its layers, masters and reduced gradients.  Out: the orthogonal regulariser's gradient, each
triplet's importance, how many are to stay at a step and above which importance.  Numbers are those of PEFT 0.21 where
its ``update_and_allocate`` gets the number of steps done.  Not collective: :mod:`optim` gathers the importances.

Memory at the owner: two fp32 averages for each element that it trains; for a moment 4 bytes for PIECE of them, and
16 for each of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_one_dist.base.targets import Target
from lora_one_dist.config.lora import LoraConfig

DECAY = 0.85  # beta1 and beta2 of section 4.1, and PEFT's defaults
PIECE = 2**22  # elements of which a copy is made


class BudgetError(ValueError):
    """A schedule that leaves nothing to prune, or no step to prune in: value, rule, remedy."""


@dataclass(frozen=True)
class Allocation:
    """How many triplets all layers together keep, by step, and the regulariser's weight."""

    initial: int
    """Triplets at the start."""
    target: int
    """At the end."""
    first: int
    """Steps before the number falls."""
    last: int
    """Step from which on the triplets that stay are the same."""
    interval: int
    """Steps between two prunings."""
    orthogonal: float
    """Weight of the mean over all A and B of ``||A A' - I||_F`` and ``||B' B - I||_F``."""

    def left(self, step: int) -> int | None:
        """Triplets that stay after ``step`` steps, or None where none is pruned.  Equation 12."""
        if step >= self.last:
            return self.target
        if step <= self.first or step % self.interval:
            return None
        share = 1 - (step - self.first) / (self.last - self.first)
        return int((self.initial - self.target) * share**3 + self.target)


def allocation_of(lora: LoraConfig, targets: Sequence[Target], total_steps: int) -> Allocation | None:
    """Of a run; None for other kinds of adapters.

    Raises:
        BudgetError: if a run with steps has none between ``adalora_warmup_steps`` and the last
            ``adalora_final_steps``, or its layers, some too narrow for ``r``, no more triplets than shall stay.
    """
    if lora.kind != "adalora":
        return None
    first, last = lora.adalora_warmup_steps, total_steps - lora.adalora_final_steps
    if total_steps and first >= last:
        raise BudgetError(lora.no_room_to_prune(f"the run has {total_steps} steps"))
    initial, target = sum(one.r for one in targets), lora.target_r * len(targets)
    if target >= initial:
        raise BudgetError(
            f"lora.adalora_target_r = {lora.target_r}: {len(targets)} layers would keep {target} triplets and have "
            f"{initial}. Lower it, or raise lora.r or lora.rank_pattern."
        )
    return Allocation(initial, target, first, last, lora.adalora_interval, lora.adalora_orthogonal)


def add_orthogonal_gradient(
    values: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor], weight: float
) -> None:
    """Add that of ``weight (||A A' - I||_F + ||B' B - I||_F)`` of each of k layers.  Equation 4.

    Args:
        values, grads: A (k, r, n) and B (k, m, r) by name, fp32; ``grads`` is added to.
    """
    A, B = values["lora_A"], values["lora_B"]
    grads["lora_A"].baddbmm_(_turned(A @ A.mT, weight), A)
    grads["lora_B"].baddbmm_(B, _turned(B.mT @ B, weight))


def _turned(gram: torch.Tensor, weight: float) -> torch.Tensor:
    """``2 weight (gram - I) / ||gram - I||_F``, 0 where the gram is I.  (k, r, r)."""
    off = gram - torch.eye(gram.shape[-1], device=gram.device)
    norm = torch.linalg.matrix_norm(off, keepdim=True).clamp_(min=torch.finfo(off.dtype).tiny)
    return off * (2 * weight / norm)


def follow(values: torch.Tensor, grads: torch.Tensor, sensitivity: torch.Tensor, uncertainty: torch.Tensor) -> None:
    """Move the averages, in place, of each element's sensitivity ``|w g|`` and of how far it is from its average.

    Equations 8 to 10.  All flat, fp32, of one size; values are those after the step that the gradients made.
    """
    pieces = (tensor.split(PIECE) for tensor in (values, grads, sensitivity, uncertainty))
    for value, grad, average, spread in zip(*pieces, strict=True):
        now = (value * grad).abs_()
        average.mul_(DECAY).add_(now, alpha=1 - DECAY)
        spread.mul_(DECAY).add_(now.sub_(average).abs_(), alpha=1 - DECAY)


def importance(sensitivity: Mapping[str, torch.Tensor], uncertainty: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of the r triplets of each of k layers, (k, r) in fp64: E's own, and the means of A's rows and B's columns.

    Equation 11.  Args: of A (k, r, n), B (k, m, r) and E (k, r), by name.
    """

    def of_layer(*layer: torch.Tensor) -> torch.Tensor:
        A, B, E = (average.double() * spread for average, spread in zip(layer[:3], layer[3:], strict=True))
        return E + A.mean(1) + B.mean(0)

    stacks = [each[name] for each in (sensitivity, uncertainty) for name in ("lora_A", "lora_B", "lora_E")]
    return torch.stack([of_layer(*layer) for layer in zip(*stacks, strict=True)])


def threshold(importances: Iterable[float], pruned: int) -> float:
    """Up to which importance triplets go, so that ``pruned`` do, and of equal ones all."""
    return sorted(importances)[pruned - 1]
