"""Which rank owns which adapter, and where its tensors lie in flat buffers.  Pure, the same on every rank.

In: targets, the number of ranks.  Out: a :class:`Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import ownership

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Block:
    """The k targets of one shape that one rank owns: their tensors of the first kind side by side, then of the next."""

    owner: int
    """Slot of the owner rank (:func:`hierarchy.slot`)."""
    targets: tuple[int, ...]
    shapes: Shapes
    """Of what a target trains, by name (:attr:`Target.trained`)."""
    start: int
    """Offset of the block inside its owner's share."""

    @property
    def size(self) -> int:
        """Elements."""
        return len(self.targets) * sum(math.prod(shape) for _, shape in self.shapes)

    def split(self, share: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (k, *shape) of this block in its owner's share, by name: stacked for one bmm, no copy."""
        found, at, k = {}, self.start, len(self.targets)
        for name, shape in self.shapes:
            count = k * math.prod(shape)
            found[name] = share[at : at + count].view(k, *shape)
            at += count
        return found


@dataclass(frozen=True)
class Layout:
    """Where each target's tensors lie in a flat one of ``world_size * share`` elements, owners one after another."""

    blocks: tuple[Block, ...]
    share: int

    def largest_sum(self, values: Sequence[int]) -> int:
        """Of a value for each target: the largest sum over what one rank owns."""
        sums: dict[int, int] = {}
        for block in self.blocks:
            sums[block.owner] = sums.get(block.owner, 0) + sum(values[i] for i in block.targets)
        return max(sums.values())

    def views(self, flat: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
        """Per target index its tensors, A (r, n) and B (m, r) of plain LoRA, inside a flat tensor of all shares."""
        found = {}
        for block in self.blocks:
            stacks = block.split(flat[block.owner * self.share : (block.owner + 1) * self.share])
            found.update({i: {name: stack[k] for name, stack in stacks.items()} for k, i in enumerate(block.targets)})
        return found


def make_layout(targets: Sequence[Target], world_size: int) -> Layout:
    """Owners balanced by layers' trained elements; shares padded to the largest, since gloo refuses uneven ones."""
    owners = ownership.assign([float(target.adapter) for target in targets], world_size)
    blocks, share = [], 1
    for owner in range(world_size):
        start = 0
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for i, target in enumerate(targets):
            if owners[i] == owner:
                by_shape.setdefault((target.m, target.n, target.r), []).append(i)
        for _, members in sorted(by_shape.items()):
            blocks.append(Block(owner, tuple(members), tuple(targets[members[0]].trained.items()), start))
            start += blocks[-1].size
        share = max(share, start)
    return Layout(tuple(blocks), share)
