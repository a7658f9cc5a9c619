"""The adapter's branch beside a frozen layer: ``y = W x + s B A x``, added in place where the layer's output is fresh.

Of T tokens: x (T, n), W (m, n), A (r, n), B (m, r), x' = dropout(x).

- forward   ``h = s A x'`` before the frozen product, ``y += B h`` behind it
- backward  ``dh = s B' dy``;  ``dA = dh' x'``, ``dB = dy' h``;  ``dx = W' dy``, ``dx += A' dh`` (through the dropout)

With LoRA-SB's core R (r, r), which trains alone, it is ``y += B R h``: ``dR = (B' dy)' h``, ``dh = s R' B' dy``.
With AdaLoRA's E (r,), the diagonal of a core, A and B train too: ``dB = dy' h E``, ``dE = sum_t (B' dy) h``.

Autograd's own form writes and reads six more (T, m) tensors a layer.  Only h and, where A trains, x' are saved, and
before the frozen product: a recomputation ends with the last tensor that was saved.  A gradient goes straight into its
parameter's ``main_grad`` (fp32, as Megatron calls it) where there is one, else to autograd.  Not collective.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from lora_one_dist.base.products import FrozenConv1D, FrozenLinear, weight_gradient

ADAPTER = "default"  # PEFT's name of the one adapter


class AdaptedLinear(lora.Linear):
    """PEFT's LoRA layer with one plain adapter, under PEFT's names, and a core if it has ``lora_R`` or ``lora_E``."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        A: Any = self.lora_A[ADAPTER]
        B: Any = self.lora_B[ADAPTER]
        dropout: Any = self.lora_dropout[ADAPTER]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        scaling = self.scaling[ADAPTER]
        x, h = _Before.apply(x, A.weight, scaling, p)
        y = self.base_layer(x)
        fresh = isinstance(self.base_layer, FrozenLinear | FrozenConv1D)
        core = self._parameters.get("lora_R", self._parameters.get("lora_E"))
        return _Behind.apply(y, h, A.weight, B.weight, core, scaling, x.grad_fn, fresh)


class _Before(torch.autograd.Function):
    """Identity on x that makes and saves h; in backward it adds the branch's part to dx."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, scaling: float, p: float) -> tuple[torch.Tensor, ...]:
        seen, kept = x.reshape(-1, x.shape[-1]).to(A.dtype), None
        if p > 0:
            seen, kept = torch.native_dropout(seen, p, True)
        h = (seen @ A.T).mul_(scaling)
        ctx.A, ctx.p, ctx.branch = A, p, None  # branch: dh and what dropout kept, from _Behind's backward
        ctx.save_for_backward(h, kept, seen if A.requires_grad else None)
        ctx.mark_non_differentiable(h)
        return x.view_as(x), h

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, None, None, None]:
        dx, (dh, kept) = grads[0], ctx.branch
        ctx.branch = None
        rows = dx.view(-1, dx.shape[-1])  # of the frozen product alone: nobody else holds it
        if kept is None and rows.dtype == dh.dtype:
            rows.addmm_(dh, ctx.A)
        else:
            change = dh @ ctx.A
            rows += change if kept is None else change.mul_(kept).div_(1 - ctx.p)
        return dx, None, None, None


class _Behind(torch.autograd.Function):
    """Adds ``B h`` to the frozen layer's output; in backward it takes the pair's gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        h: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        R: torch.Tensor | None,
        scaling: float,
        before: Any,
        fresh: bool,
    ) -> torch.Tensor:
        ctx.A, ctx.B, ctx.R, ctx.scaling, ctx.before = A, B, R, scaling, before
        if fresh:
            ctx.mark_dirty(y)
        output = y if fresh else y.clone()
        h = _through(R, h)
        output.view(-1, y.shape[-1]).addmm_(h.to(y.dtype), B.T.to(y.dtype))
        return output  # no view: a model's own code may go on to write to it

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, kept, x = ctx.before.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1]).to(h.dtype)
        dh, R, dR = dy @ ctx.B, ctx.R, None
        if R is not None:
            dR = _give(R, dh, h) if R.dim() == 2 else give(R, (dh.float() * h.float()).sum(0))
            dh = _through(R.T if R.dim() == 2 else R, dh)
        dh.mul_(ctx.scaling)
        ctx.before.branch = dh, kept
        trains = ctx.A.requires_grad  # LoRA-SB's A and B do not
        dA, dB = (_give(ctx.A, dh, x), _give(ctx.B, dy, _through(R, h))) if trains else (None, None)
        return grads[0], None, dA, dB, dR, None, None, None


def _through(core: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
    """``R h`` of rows h (T, r), for a core R (r, r), the diagonal of one (r,), or none."""
    if core is None:
        return h
    return h @ core.T if core.dim() == 2 else h * core


def _give(parameter: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """``left' right``, the parameter's gradient: into its ``main_grad``, or back to autograd."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        return left.T @ right
    weight_gradient(left, right, main_grad)
    parameter.grad_added_to_main_grad = True
    return None


def give(parameter: Any, grad: torch.Tensor) -> torch.Tensor | None:
    """A gradient in fp32: into its parameter's ``main_grad``, or back to autograd."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        return grad.to(parameter.dtype)
    main_grad.add_(grad)
    parameter.grad_added_to_main_grad = True
    return None
