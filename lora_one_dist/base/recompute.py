"""What is computed again in backward instead of being kept: gradient checkpointing of the frozen blocks.

In: a loaded model.  Out: the same model, set so that backward recomputes each block but the last.  Not collective.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lora_one_dist.base.blocks import blocks


class _FrozenProduct(torch.autograd.Function):
    """A frozen layer's ``X W^T + bias`` that saves no tensor: backward takes W (m, n) from the layer."""

    @staticmethod
    def forward(ctx: Any, layer_input: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(layer_input, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output[0] @ ctx.layer.weight, None


class FrozenLinear(nn.Linear):
    """A frozen layer whose product keeps nothing for backward but what the layer itself holds."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(input, self)


def recompute_blocks(model: Any, reentrant: bool) -> None:
    """Let backward compute each transformer block but the last again, by the kind of checkpointing named."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name does not exist in transformers 5.17
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    last: Any
    for last in blocks(model)[-1:]:
        last.gradient_checkpointing = False  # backward begins with it: it would be computed again at once
    if not reentrant:
        _save_nothing_behind_the_last_input(model)


def _save_nothing_behind_the_last_input(model: nn.Module) -> None:
    """Let a recomputation end at the input of a block's last linear layer, whose own product nothing needs.

    Non-reentrant checkpointing ends it with the last tensor that the forward pass saved; autograd's own product would
    save the weight behind it.  In a Llama that is a quarter of the block's work.
    """
    for block in blocks(model):
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = FrozenLinear
