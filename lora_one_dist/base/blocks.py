"""The transformer blocks of any model, and of one with an encoder its two parts: which modules they are.  Pure."""

from __future__ import annotations

from typing import Any

from torch import nn


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost module lists: the transformer's blocks, and of some models others.  Pure."""
    if isinstance(model, nn.ModuleList):
        return [model]
    return [stack for child in model.children() for stack in stacks(child)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: members of the outermost module lists.  Pure."""
    return [block for stack in stacks(model) for block in stack]


def has_encoder(model: Any) -> bool:
    """Is the model of two stacks?"""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def parts(model: Any) -> tuple[Any, Any]:
    """The encoder and the decoder, in the order in which a forward pass runs them."""
    return model.get_encoder(), model.get_decoder()
