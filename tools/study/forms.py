"""Forms of the preconditioner that were tried: pure functions of one step of the pairs of one shape.

In: the stacked pairs of a :class:`lora_one_dist.train.optim.Block`, their gradients (clipped, not preconditioned) and
moments.  Out: the step of each matrix, before the learning rate.  ``none``, ``paper`` and ``rescaled`` at any
damping are the package's own.

Notation: for lora_A the Gram is ``H = B'B``, for lora_B ``H = AA'`` (r x r); ``d`` its damping; ``u(g)`` AdamW's
direction, of a matrix's own moments.  A preconditioner is ``P = (H + d I)^-power``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Form:
    """One way to precondition AdamW."""

    place: Literal["off", "before", "after", "around"] = "before"
    """before: u(P g); after: P u(g); around: P^1/2 u(P^1/2 g), which no change of the pair's basis alters."""
    damping: float = 1e-6
    relative: bool = False
    """Is the damping in units of the Gram's mean eigenvalue?"""
    rescale: bool = False
    """Scale each result to the norm that it had without P, matrix by matrix."""
    memory: float = 0.0
    """The Gram is an average over the steps, of which each keeps this share; 1: that of the first step."""
    warm_up: int = 0
    """Steps over which the relative damping falls from 100 to ``damping``, geometrically."""
    fade: bool = False
    """Does the damping grow as the rate falls: divided by the rate's share of its peak?"""
    project: bool = False
    """Take from lora_B's gradient what lora_A's step covers: (I - B (B'B)^-1 B') g_B, as LoRA-Pro does."""
    whiten: bool = False
    """In place of u: moments of ``P^1/2 g`` whose second is r x r, as LoRA-RITE's."""


PAPER = Form()
RELATIVE = Form(damping=0.01, relative=True)
FORMS: Mapping[str, Form] = {
    "none": Form(place="off"),
    "paper": PAPER,
    "damping 1e-2 (PEFT)": replace(PAPER, damping=1e-2),
    "damping 0.1": replace(PAPER, damping=0.1),
    "damping 1": replace(PAPER, damping=1.0),
    "relative 0.01": RELATIVE,
    "relative 1": replace(RELATIVE, damping=1.0),
    "rescaled": replace(PAPER, rescale=True),
    "rescaled, relative 0.1": replace(RELATIVE, damping=0.1, rescale=True),
    "rescaled, relative 1": replace(RELATIVE, damping=1.0, rescale=True),
    "rescaled, relative 10": replace(RELATIVE, damping=10.0, rescale=True),
    "rescaled, fading": replace(RELATIVE, damping=1.0, rescale=True, fade=True),
    "first Gram": replace(RELATIVE, memory=1.0),
    "slow Gram": replace(RELATIVE, memory=0.95),
    "warm-up": replace(RELATIVE, warm_up=56),
    "after": replace(RELATIVE, place="after", rescale=True),
    "after, relative 0.1": replace(RELATIVE, damping=0.1, place="after", rescale=True),
    "after, relative 1": replace(RELATIVE, damping=1.0, place="after", rescale=True),
    "after, not rescaled": replace(RELATIVE, damping=0.1, place="after"),
    "around": replace(RELATIVE, place="around", rescale=True),
    "around, not rescaled": replace(RELATIVE, place="around"),
    "whitened (LoRA-RITE)": replace(RELATIVE, place="around", whiten=True),
    "projected (LoRA-Pro)": replace(PAPER, project=True, rescale=True),
}


@dataclass
class Moments:
    """Of a stack of matrices, and what a form keeps beside them."""

    first: torch.Tensor
    second: torch.Tensor
    gram: torch.Tensor | None = None
    whitening: torch.Tensor | None = None


def power_of(gram: torch.Tensor, damping: torch.Tensor, exponent: float) -> torch.Tensor:
    """``(H + damping I)^-exponent`` of symmetric H (k, r, r) with a damping (k,) for each, in fp64."""
    values, vectors = torch.linalg.eigh(gram)
    raised = (values.clamp(min=0) + damping.unsqueeze(-1)).pow(-exponent)
    return (vectors * raised.unsqueeze(-2)) @ vectors.mT


def remembered(moments: Moments, gram: torch.Tensor, memory: float) -> torch.Tensor:
    """The Gram in force."""
    if moments.gram is None or memory == 0.0:
        moments.gram = gram.clone()
    elif memory < 1.0:
        moments.gram.lerp_(gram, 1 - memory)
    return moments.gram


def direction(grad: torch.Tensor, moments: Moments, step: int, betas: tuple[float, float], eps: float) -> torch.Tensor:
    """AdamW's step over its rate."""
    moments.first.lerp_(grad, 1 - betas[0])
    moments.second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    return moments.first / (1 - betas[0] ** step) / ((moments.second / (1 - betas[1] ** step)).sqrt() + eps)


def whitened(grad: torch.Tensor, moments: Moments, step: int, betas: tuple[float, float]) -> torch.Tensor:
    """``V^-1/2 g`` with the r x r second moment V of the rows of ``grad`` (k, r, n); its entries have a size of 1."""
    outer = grad.double() @ grad.double().mT / grad.shape[-1]
    if moments.whitening is None:
        moments.whitening = torch.zeros_like(outer)
    moments.whitening.lerp_(outer, 1 - betas[1])
    second = moments.whitening / (1 - betas[1] ** step)
    floor = 1e-6 * second.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    moments.first.lerp_((power_of(second, floor, 0.5) @ grad.double()).float(), 1 - betas[0])
    return moments.first / (1 - betas[0] ** step)


def _sized(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``result`` with the norm of ``like``, matrix by matrix."""
    norms = [torch.linalg.matrix_norm(tensor) for tensor in (like, result)]
    return result * (norms[0] / norms[1].clamp(min=1e-30)).view(-1, 1, 1).to(result.dtype)


def _dampings(form: Form, gram: torch.Tensor, step: int, share_of_peak: float) -> torch.Tensor:
    """(k,) the damping of each matrix at this step (from 1), whose rate is a share of its peak."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    if form.fade:
        return mean * form.damping / max(share_of_peak, 1e-3)
    if step <= form.warm_up:
        share = (step - 1) / form.warm_up
        return mean * 100.0 ** (1 - share) * form.damping**share
    return mean * form.damping if form.relative else torch.full_like(mean, form.damping)


def steps_of_pairs(
    A: torch.Tensor,
    B: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    moments: tuple[Moments, Moments],
    step: int,
    betas: tuple[float, float],
    eps: float,
    form: Form,
    share_of_peak: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of A (k, r, n) and B (k, m, r) at a rate of 1, both from the values before it; changes the moments."""
    A64, B64 = A.double(), B.double()
    grams = (B64.mT @ B64, A64 @ A64.mT)
    if form.project:
        basis = torch.linalg.qr(B64).Q
        grad_B = (grad_B.double() - basis @ (basis.mT @ grad_B.double())).float()
    found = [
        _step(grad, gram, kept, step, betas, eps, form, share_of_peak)
        for grad, gram, kept in zip((grad_A, grad_B.mT), grams, moments, strict=True)
    ]
    return found[0], found[1].mT


def _step(
    grad: torch.Tensor,
    gram: torch.Tensor,
    moments: Moments,
    step: int,
    betas: tuple[float, float],
    eps: float,
    form: Form,
    share_of_peak: float,
) -> torch.Tensor:
    """Of matrices (k, r, n) with the r x r Grams of their partners."""
    if form.place == "off":
        return direction(grad, moments, step, betas, eps)
    gram = remembered(moments, gram, form.memory)
    damping = _dampings(form, gram, step, share_of_peak)
    P = power_of(gram, damping, 0.5 if form.place == "around" else 1.0)

    def preconditioned(value: torch.Tensor) -> torch.Tensor:
        return (P @ value.double()).float()

    if form.place == "before":
        given = preconditioned(grad)
        return direction(_sized(given, grad) if form.rescale else given, moments, step, betas, eps)
    inner = preconditioned(grad) if form.place == "around" else grad
    u = whitened(inner, moments, step, betas) if form.whiten else direction(inner, moments, step, betas, eps)
    return _sized(preconditioned(u), u) if form.rescale else preconditioned(u)
