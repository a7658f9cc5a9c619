"""A trained embedding's gradient: that of autograd, in fp32 whatever the table's type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_one_dist.adapters.tables import WholeEmbedding
from tests import reference


@pytest.mark.parametrize("scale", [None, torch.tensor(50.6)], ids=["plain", "with a factor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_whole_embedding(dtype, scale):
    """Of 4000 tokens of which most are one: bf16 sums stand still once they are 256 times what is added."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (4, 1000)).clamp(min=5)
    layer = nn.Embedding(9, 16, padding_idx=7, dtype=dtype)
    exact = nn.Embedding(9, 16, padding_idx=7, _weight=layer.weight.detach().double())
    layer.__class__ = WholeEmbedding
    factor = 1.0 if scale is None else scale.to(dtype)
    if scale is not None:
        layer.embed_scale = scale
    layer.weight.main_grad = torch.zeros(9, 16)
    output = layer(tokens)
    assert torch.equal(output, layer.weight[tokens] * factor)
    change = torch.rand(4, 1000, 16).to(dtype)
    output.backward(change)
    (exact(tokens) * float(factor)).backward(change.double())
    assert layer.weight.grad is None
    assert layer.weight.grad_added_to_main_grad
    assert reference.relative(layer.weight.main_grad, exact.weight.grad) <= 1e-5  # fp32 sums of 2500 numbers
