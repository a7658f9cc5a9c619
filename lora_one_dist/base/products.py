"""Products around a weight: a frozen layer's, which saves nothing, a trained one's, and a weight's gradient.  Pure."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one_dist.base.blocks import blocks


class _FrozenProduct(torch.autograd.Function):
    """A frozen layer's ``X W^T + bias`` that saves no tensor: backward takes W (m, n) from the layer."""

    @staticmethod
    def forward(ctx: Any, layer_input: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        rows = nn.functional.linear(layer_input.reshape(-1, layer_input.shape[-1]), layer.weight, layer.bias)
        # No view, as that of a bias is else: others write to it (an adapter, a model's residual).
        return torch.ops.aten._unsafe_view(rows, [*layer_input.shape[:-1], rows.shape[-1]])

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output[0] @ ctx.layer.weight, None


class FrozenLinear(nn.Linear):
    """A frozen layer whose product keeps nothing for backward but what the layer itself holds."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(input, self)


class _FrozenConv1DProduct(torch.autograd.Function):
    """A frozen Conv1D's ``X W + bias``, W (n, m), that saves no tensor."""

    @staticmethod
    def forward(ctx: Any, layer_input: torch.Tensor, layer: Conv1D) -> torch.Tensor:
        ctx.layer = layer
        rows = torch.addmm(layer.bias, layer_input.reshape(-1, layer.nx), layer.weight)
        return torch.ops.aten._unsafe_view(rows, [*layer_input.shape[:-1], layer.nf])  # as above

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output[0] @ ctx.layer.weight.T, None


class FrozenConv1D(Conv1D):
    """A frozen Conv1D whose product keeps nothing for backward but what the layer itself holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenConv1DProduct.apply(x, self)


class _TrainedProduct(torch.autograd.Function):
    """A trained layer's ``X W^T + bias`` that saves X alone: backward takes W from the layer.

    Autograd's own saves a view of W, which would keep the whole of what ZeRO-3 has gathered until backward.
    """

    @staticmethod
    def forward(
        ctx: Any, layer_input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: nn.Module
    ) -> torch.Tensor:
        ctx.layer, ctx.transposed = layer, isinstance(layer, Conv1D)
        ctx.save_for_backward(layer_input)
        return nn.functional.linear(layer_input, weight.T if ctx.transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dX = dW = bias = None
        dY, X = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad_output[0], *ctx.saved_tensors))
        weight = ctx.layer.weight
        if ctx.needs_input_grad[0]:
            dX = grad_output[0] @ (weight.T if ctx.transposed else weight)
        if ctx.needs_input_grad[1]:
            dW = X.T @ dY if ctx.transposed else dY.T @ X
        if ctx.needs_input_grad[2]:
            bias = dY.sum(0)
        return dX, dW, bias, None


class TrainedLinear(nn.Linear):
    """A trained layer whose product keeps its input for backward, and no weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _TrainedProduct.apply(input, self.weight, self.bias, self)


class TrainedConv1D(Conv1D):
    """A trained Conv1D whose product keeps its input for backward, and no weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _TrainedProduct.apply(x, self.weight, self.bias, self)


def train_products(model: nn.Module) -> None:
    """Let all weights be trained, and the products of linear layers keep none of them.  Pure."""
    model.requires_grad_(True)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = TrainedLinear
        elif type(layer) is Conv1D:
            layer.__class__ = TrainedConv1D


def freeze_products(model: nn.Module) -> None:
    """Let the products of the blocks' linear layers save nothing.  Pure.

    Non-reentrant checkpointing ends a recomputation with the last tensor that the forward pass saved, then the input of
    a block's last linear layer; autograd's own product would save the weight behind it.  In a Llama that is a quarter
    of the block's work.
    """
    for block in blocks(model):
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = FrozenLinear
            elif type(layer) is Conv1D:
                layer.__class__ = FrozenConv1D


def weight_gradient(
    grad_output: torch.Tensor, layer_input: torch.Tensor, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    """``dY^T X`` in fp32, added in place to ``add_to`` if given.  Pure.

    grad_output (..., m), layer_input (..., n) -> (m, n) fp32.  Products of bf16 are exact in fp32, so a GPU takes them
    as they are and accumulates in fp32; a CPU has no such product and goes through fp32 copies.
    """
    dY = grad_output.reshape(-1, grad_output.shape[-1]).T
    X = layer_input.reshape(-1, layer_input.shape[-1]).to(dY.dtype)  # a layer kept in fp32 may see others' bf16
    if dY.is_cuda and dY.dtype != torch.float32:
        G = torch.mm(dY, X, out_dtype=torch.float32)
        return G if add_to is None else add_to.add_(G)
    dY, X = dY.float(), X.float()
    return dY @ X if add_to is None else add_to.addmm_(dY, X)
