"""The truth: naive, single-process, whole model, float64 where it matters.  Shares no code with the package."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def token_losses(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of each target token of one sample, unpadded."""
    ids = torch.tensor([sample["input_ids"]])
    labels = torch.tensor(sample["labels"][1:])
    logits = model(input_ids=ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


def mean_loss(model: Any, samples: list[dict[str, Any]], groups: list[list[int]] | None = None) -> torch.Tensor:
    """Mean over all target tokens; with ``groups`` the mean of the groups' means."""
    if groups is None:
        return torch.cat([token_losses(model, sample) for sample in samples]).mean()
    return torch.stack([torch.cat([token_losses(model, samples[i]) for i in group]).mean() for group in groups]).mean()


def full_gradient(
    model: Any, samples: list[dict[str, Any]], names: list[str], groups: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """dL/dW of the named linear layers by plain autograd on their weights."""
    weights = [model.get_submodule(name).weight for name in names]
    gradients = torch.autograd.grad(mean_loss(model, samples, groups), weights)
    return dict(zip(names, gradients, strict=True))


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth||_F / ||truth||_F in float64."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def riemannian_adamw(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    gradients: list[list[tuple[torch.Tensor, torch.Tensor]]],
    rates: list[float],
    *,
    ratio_b: float,
    dampings: list[float] | None,
    rescale: bool,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Textbook float64 loop over steps and pairs: clip the raw gradient, precondition, AdamW on what comes out."""
    state = [[x.double().clone() for x in pair] for pair in pairs]
    moments = [[(torch.zeros_like(x), torch.zeros_like(x)) for x in pair] for pair in state]
    for t, (step_gradients, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(float(g.double().square().sum()) for pair in step_gradients for g in pair))
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for i, (gA, gB) in enumerate(step_gradients):
            (A, B), eye = state[i], torch.eye(state[i][0].shape[0], dtype=torch.float64)
            g = [gA.double() * scale, gB.double() * scale]
            if dampings is not None:
                grams = [B.T @ B, A @ A.T]
                units = [torch.linalg.eigvalsh(gram).mean() if rescale else 1.0 for gram in grams]
                own = [dampings[t - 1] * unit * eye for unit in units]
                P = [torch.linalg.inv(gram + damped) for gram, damped in zip(grams, own, strict=True)]
                raw, g = g, [P[0] @ g[0], g[1] @ P[1]]
                if rescale:
                    g = [new * (old.norm() / new.norm()) for new, old in zip(g, raw, strict=True)]
            for side in (0, 1):
                m = betas[0] * moments[i][side][0] + (1 - betas[0]) * g[side]
                v = betas[1] * moments[i][side][1] + (1 - betas[1]) * g[side] ** 2
                moments[i][side] = (m, v)
                lr = rate * (ratio_b if side else 1.0)
                update = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
                state[i][side] = state[i][side] * (1 - lr * decay) - lr * update
    return [(A, B) for A, B in state]
