"""The transformer blocks of any model: which modules they are.  Pure."""

from __future__ import annotations

from torch import nn


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost module lists: the transformer's blocks, and of some models others.  Pure."""
    if isinstance(model, nn.ModuleList):
        return [model]
    return [stack for child in model.children() for stack in stacks(child)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: members of the outermost module lists.  Pure."""
    return [block for stack in stacks(model) for block in stack]
