"""A gradient's way to where it is summed, and a step of an optimizer on one tensor, in place.  Not collective."""

from __future__ import annotations

from typing import Any

import torch


class OptimizerError(RuntimeError):
    """An adapter's gradient is missing or zero, or a preconditioner cannot be factorised."""


def adamw_(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place, step counted from 1, with bias correction.  Any shape, fp32.

    Source: arXiv 1711.05101, algorithm 2 (the learning rate scales the decay, as in torch).
    """
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
    parameter.mul_(1 - lr * weight_decay).addcdiv_(first, denominator, value=-lr / (1 - betas[0] ** step))


def sgd_(parameter: torch.Tensor, grad: torch.Tensor, lr: float, weight_decay: float) -> None:
    """One SGD step in place with decoupled weight decay.  Any shape, fp32."""
    parameter.mul_(1 - lr * weight_decay).add_(grad, alpha=-lr)


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this global norm are multiplied by to be at most ``limit``; 0: they are not clipped."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0  # 1e-6 as torch.clip_grad_norm_


def move_to_main_grad(parameter: Any) -> None:
    """What autograd has left in ``.grad``: nothing where a layer has added to ``main_grad`` itself."""
    if parameter.grad is None:
        return
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
    parameter.grad_added_to_main_grad = True
