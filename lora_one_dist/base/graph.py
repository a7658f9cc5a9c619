"""Where autograd's graph begins in a model whose weights are all frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_one_dist.base.blocks import has_encoder, parts


class _Begin(torch.autograd.Function):
    """A tensor made part of a graph, itself: no leaf, so that a model's own code may go on to write to it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


def begin_graph(tensor: torch.Tensor) -> None:
    """Let autograd follow what is made of a tensor from here on, and keep no gradient for it.

    In place of ``requires_grad_``, which makes a leaf: writing to that is an error (GIT adds positions in place).
    """
    if torch.is_grad_enabled() and not tensor.requires_grad:
        _Begin.apply(tensor, torch.empty(0, requires_grad=True))


class _Own(torch.autograd.Function):
    """The same values as a tensor that is no view of another."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.data

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def followed(output: torch.Tensor) -> torch.Tensor:
    """A layer's output, for a hook on it that must see its gradient even if the model's own code then writes to it.

    A layer with a bias gives a view, and of a view that is written to autograd forgets the hooks (LED's queries).
    """
    followed: torch.Tensor = _Own.apply(output) if output.requires_grad and output._is_view() else output
    return followed


def begin_at_embeddings(model: nn.Module) -> None:
    """Begin a graph at the output of every input embedding, in each forward pass to come.  Pure."""
    found = [input_embedding(part) for part in model.modules() if isinstance(part, PreTrainedModel)]
    if has_encoder(model):
        found += map(input_embedding, parts(model))
    for embedding in dict.fromkeys(found):
        if embedding is not None:
            embedding.register_forward_hook(lambda layer, inputs, output: begin_graph(output))


def input_embedding(part: Any) -> nn.Module | None:
    """Of a model, or of a part of one that has some."""
    if not isinstance(part, PreTrainedModel):  # FSMT's encoder and decoder
        return getattr(part, "embed_tokens", None)
    try:
        found: Any = part.get_input_embeddings()
    except NotImplementedError:  # of some parts of a model: a vision tower
        return None
    return found if isinstance(found, nn.Module) else None
