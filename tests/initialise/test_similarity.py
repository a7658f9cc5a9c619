"""Sign and magnitude similarity of two matrices, by hand and in many pieces."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.initialise import spectral
from lora_one_dist.initialise.similarity import similarity


def test_by_hand():
    first = torch.tensor([[1.0, -1.0, 0.0, 3.0], [2.0, -0.5, 0.0, -1.0]])
    second = torch.tensor([[2.0, 1.0, 0.0, 0.1], [20.0, -5.1, 1.0, -0.1]])
    # Signs differ in two places, of which one is a zero; magnitudes in three: 3 : 0.1, 0.5 : 5.1, 0 : 1.
    assert similarity(first, second) == (6 / 8, 5 / 8)
    assert similarity(first, first) == (1.0, 1.0)
    assert similarity(first, -first) == (2 / 8, 1.0)
    assert similarity(first, 11 * first) == (1.0, 2 / 8)
    assert similarity(first, 11 * first, scale=2) == (1.0, 1.0)


def test_every_element_counts_of_matrices_in_several_pieces():
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(1000, 300, generator=generator) for _ in range(2))
    assert first.numel() > spectral.NORM_CHUNK["cpu"]
    ratio = (first.double() / second.double()).abs()
    sign = float((first * second > 0).double().mean())
    near = float(((ratio <= 10) & (ratio >= 0.1)).double().mean())
    assert similarity(first, second) == pytest.approx((sign, near), abs=1.5 / first.numel())  # one at the border
