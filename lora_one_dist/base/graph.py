"""Where autograd's graph begins in a model whose weights are all frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


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


def begin_at_embeddings(model: nn.Module) -> None:
    """Begin a graph at the output of every input embedding, in each forward pass to come.  Pure."""
    known = set()
    for part in model.modules():
        embedding = _embedding(part) if isinstance(part, PreTrainedModel) else None
        if embedding is not None and embedding not in known:
            known.add(embedding)
            embedding.register_forward_hook(lambda layer, inputs, output: begin_graph(output))


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        found: Any = model.get_input_embeddings()
    except NotImplementedError:  # of some parts of a model: a vision tower
        return None
    return found if isinstance(found, nn.Module) else None
