"""DoRA: each row of ``W + s B A`` has a trained magnitude (arXiv 2402.09353, equation 5).

In: an adapted layer inside a loaded base.  Out: ``y = m / ||W + s B A|| * (W x + s B A x)``, with one magnitude m and
one norm for each of the m rows; a bias is added behind.  The norms are constants to backward, as section 4.3 has it.

The base is not gathered for them: the norms are taken while a layer's weight is whole for its own product, from
``||W||^2 + 2 s <W A', B> + s^2 <B A A', B>`` by rows, r / T of the product's work for T tokens.  ``||W||^2`` is taken
once.  Saved for backward besides plain LoRA's: the rows (T, m) before they are scaled.

Dropout is on the branch's x alone, as the equation has it; PEFT's code drops the base's x too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one_dist.adapters.branch import ADAPTER, AdaptedLinear, give
from lora_one_dist.base.products import weight_gradient

AT_ONCE = 1024  # tokens of which fp32 copies are made


class DoraLinear(AdaptedLinear):
    """PEFT's LoRA layer with one adapter, its rows scaled to ``lora_magnitude`` (m,)."""

    lora_magnitude: nn.Parameter
    base_squares: torch.Tensor | None
    norms: torch.Tensor
    keeps_norms: bool

    @staticmethod
    def put(layer: Any, magnitude: nn.Parameter) -> None:
        """Make one of an adapted layer, in place."""
        layer.__class__ = DoraLinear
        layer.lora_magnitude, layer.base_squares, layer.keeps_norms = magnitude, None, False
        layer.base_layer.register_forward_pre_hook(lambda base, given: layer.take_norms(base))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = super().forward(x)
        return _ScaleRows.apply(y, self.lora_magnitude, self.norms, self.base_layer.bias)

    @torch.no_grad()
    def take_norms(self, base: Any) -> None:
        """The norms of the rows now, while the base's weight is whole; from an evaluation's first pass on kept."""
        if self.keeps_norms and not self.training:
            return
        self.keeps_norms = not self.training
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        if self.base_squares is None:
            self.base_squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        held: list[Any] = [self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight]
        A, B = (weight.float() for weight in held)
        s = self.scaling[ADAPTER]
        crossed = (weight_gradient(weight.T, A.T) * B).sum(1)
        squares = self.base_squares + 2 * s * crossed + s * s * ((B @ (A @ A.T)) * B).sum(1)
        self.norms = squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


class _ScaleRows(torch.autograd.Function):
    """``(y - bias) m / norms + bias``; the gradient of m goes into its ``main_grad``."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, magnitude: torch.Tensor, norms: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows = y if bias is None else y - bias
        ctx.magnitude, ctx.norms, ctx.factor = magnitude, norms, magnitude.detach().float() / norms
        ctx.save_for_backward(rows)
        output = torch.mul(rows, ctx.factor, out=torch.empty_like(rows))  # in fp32, rounded once
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,), dy, moved = ctx.saved_tensors, grads[0], torch.zeros_like(ctx.norms)
        for part, of in zip(*(tensor.flatten(0, -2).split(AT_ONCE) for tensor in (rows, dy)), strict=True):
            moved += (part.float() * of.float()).sum(0)
        below = torch.mul(dy, ctx.factor, out=torch.empty_like(dy))
        return below, give(ctx.magnitude, moved / ctx.norms), None, None
