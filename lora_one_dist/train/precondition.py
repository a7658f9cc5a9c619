"""Gradients of a LoRA pair turned before the optimizer takes them.  Pure, batched over k pairs of one shape.

In: pairs and their gradients, fp32, on the owner of both.  Out: gradients of the same shapes, fp32.  Nothing here knows
of ranks.
"""

from __future__ import annotations

import torch

from lora_one_dist.config.optim import OptimConfig
from lora_one_dist.train.updates import OptimizerError

FAINTEST = 1e-3  # the least share of its peak that a rate has for the damping: the first step of a warm-up has none
TINY = 1e-30  # in place of a mean eigenvalue or a norm that is zero
CHUNK = {"cpu": 2**18, "cuda": 2**24}  # adapter elements preconditioned at once: what a cache holds; few kernels


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


def damping_at(lr: float, config: OptimConfig) -> float:
    """The preconditioner's damping at a rate.  Pure; only where there is a preconditioner.

    Of rescaled it grows as the rate falls: the last steps, mostly noise, are AdamW's own (results/defaults).
    """
    damping = config.damping_in_force
    assert damping is not None
    return damping / max(lr / config.lr, FAINTEST) if config.form == "rescaled" else damping
