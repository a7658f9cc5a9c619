"""How alike two gradients of one layer are, element by element: pure functions of two matrices.

With the overlap of their top spaces (:func:`lora_one_dist.initialise.spectral.subspace_overlap`) they tell whether few
samples give the gradient of many.
"""

from __future__ import annotations

import torch

from lora_one_dist.initialise.spectral import NORM_CHUNK

NEAR = 10.0  # LoRA-GA's "same order of magnitude"


def similarity(first: torch.Tensor, second: torch.Tensor, scale: float = 1.0) -> tuple[float, float]:
    """Shares of the elements that have the same sign, and magnitudes within a factor of NEAR of each other.

    Args:
        first, second: of one shape.  scale: of the first, above 0.

    Source: the table of sign and magnitude similarity in arXiv 2407.05000.
    """
    size = NORM_CHUNK[first.device.type]  # in pieces: no third matrix beside the two
    same = near = 0
    for a, b in zip(first.reshape(-1).split(size), second.reshape(-1).split(size), strict=True):
        same += int((a.sign() == b.sign()).sum())
        a, b = scale * a.abs(), b.abs()
        near += int(((a <= NEAR * b) & (b <= NEAR * a)).sum())
    return same / first.numel(), near / first.numel()
