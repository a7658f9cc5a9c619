"""LoRA-Pro: a pair's gradients so adjusted that the change of W which they make is the nearest to full fine-tuning's.

In: pairs A (k, r, n), B (k, m, r) and gradients of the same shapes, on the owner.  Out: gradients again.  A pair's step
moves W by ``s B dA + s dB A``; with G the gradient of W, ``gA = s B'G`` and ``gB = s G A'``, the nearest to G is

    E = s B dA + s dB A,   dA = (B'B)^-1 gA / s^2 + X A,   dB = (I - B (B'B)^-1 B') gB (AA')^-1 / s^2 - B X

for any X, which cancels in E.  The X that keeps dA, dB nearest to gA, gB solves

    B'B X + X AA' = -(B'B)^-1 gA A' / s^2

With AdamW the moments are E's, as large as W, and what comes of them takes G's place: 8 m n bytes a target on its
owner, as in full fine-tuning.  Pure; fp64 inside, as in :mod:`precondition`.

Source: arXiv 2407.18242, theorems 2.1 to 2.3 and algorithm 2.
"""

from __future__ import annotations

import torch

from lora_one_dist.train.updates import OptimizerError, adamw_

Pair = tuple[torch.Tensor, torch.Tensor]


def adjusted(
    A: torch.Tensor, B: torch.Tensor, gA: torch.Tensor, gB: torch.Tensor, s: torch.Tensor, damping: float
) -> Pair:
    """dA (k, r, n) and dB (k, m, r), fp64.

    Args:
        s: scales (k, 1, 1).  damping: added to the diagonals of B'B and AA' before they are inverted.

    Raises:
        OptimizerError: if one of them is not positive definite even so.
    """
    A, B, gA, gB = (tensor.double() for tensor in (A, B, gA, gB))
    (values_B, vectors_B), (values_A, vectors_A) = _spectrum(B.mT @ B, damping), _spectrum(A @ A.mT, damping)
    gram_B, gram_A = (_inverse(*of) for of in ((values_B, vectors_B), (values_A, vectors_A)))
    dA, dB = _without_x(A, B, gA, gB, s, gram_B, gram_A)
    right = vectors_B.mT @ (dA @ A.mT) @ vectors_A
    X = -vectors_B @ (right / (values_B[:, :, None] + values_A[:, None, :])) @ vectors_A.mT
    return dA + X @ A, dB - B @ X


def equivalent(
    A: torch.Tensor, B: torch.Tensor, gA: torch.Tensor, gB: torch.Tensor, s: torch.Tensor, damping: float
) -> torch.Tensor:
    """E (k, m, n), fp64.  Args, Raises: as :func:`adjusted`."""
    A, B, gA, gB = (tensor.double() for tensor in (A, B, gA, gB))
    gram_B, gram_A = (_inverse(*_spectrum(gram, damping)) for gram in (B.mT @ B, A @ A.mT))
    dA, dB = _without_x(A, B, gA, gB, s, gram_B, gram_A)
    return s * (B @ dA + dB @ A)


def _without_x(
    A: torch.Tensor,
    B: torch.Tensor,
    gA: torch.Tensor,
    gB: torch.Tensor,
    s: torch.Tensor,
    inverse_B: torch.Tensor,
    inverse_A: torch.Tensor,
) -> Pair:
    projected = gB - B @ (inverse_B @ (B.mT @ gB))
    return inverse_B @ gA / s**2, projected @ inverse_A / s**2


def _spectrum(gram: torch.Tensor, damping: float) -> Pair:
    """Eigenvalues, damped, and eigenvectors of r x r matrices."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0) + damping
    if not bool((values > 0).all()):
        raise OptimizerError(f"optim.damping = {damping:g}: a Gram is not positive definite. Raise it.")
    return values, vectors


def _inverse(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (vectors / values[:, None, :]) @ vectors.mT


class Moments:
    """AdamW's of k targets' E, fp32 (k, m, n)."""

    def __init__(self, k: int, m: int, n: int, device: torch.device):
        self.first, self.second = (torch.zeros(k, m, n, device=device) for _ in range(2))

    @property
    def kinds(self) -> dict[str, torch.Tensor]:
        """By the names that torch's AdamW has for them."""
        return {"exp_avg": self.first, "exp_avg_sq": self.second}

    def turn(
        self,
        pair: Pair,
        grads: Pair,
        s: torch.Tensor,
        damping: float,
        step: int,
        betas: tuple[float, float],
        eps: float,
    ) -> Pair:
        """Steps dA and dB, fp32, to take at the learning rate; one target after another, 40 m n bytes at a time."""
        turned = []
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            A, B, gA, gB = (tensor[i : i + 1] for tensor in (*pair, *grads))
            E = equivalent(A, B, gA, gB, s[i : i + 1], damping)[0].float()
            G = torch.zeros_like(E)
            adamw_(G, E, first, second, step, -1.0, betas, eps, 0.0)  # the step itself, upwards
            G = G.double()
            raw = s[i] * (B[0].double().T @ G), s[i] * (G @ A[0].double().T)
            turned.append(adjusted(A, B, raw[0][None], raw[1][None], s[i : i + 1], damping))
        return torch.cat([dA for dA, _ in turned]).float(), torch.cat([dB for _, dB in turned]).float()
