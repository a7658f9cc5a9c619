"""Where autograd's graph begins: at a tensor that a model's own code may go on to write to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_one_dist.base.graph import begin_at_embeddings, begin_graph, followed
from lora_one_dist.base.recompute import recompute_blocks
from tests import models


def test_what_begins_a_graph_may_be_written_to():
    tensor, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    begin_graph(tensor)
    tensor += weight
    (2 * tensor).sum().backward()
    assert weight.grad.tolist() == [2, 2, 2]
    assert tensor.tolist() == [2, 2, 2]


def test_no_graph_where_none_is_asked_for():
    tensor = torch.ones(3)
    with torch.no_grad():
        begin_graph(tensor)
    assert not tensor.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_is_written_to_has_its_gradient(bias):
    layer, seen = nn.Linear(4, 5, bias=bias).requires_grad_(False), []
    plain, given = (torch.ones(2, 3, 4, requires_grad=True) for _ in range(2))
    output = followed(layer(given))
    output.register_hook(seen.append)
    output /= 2
    output.sum().backward()
    assert [float(gradient.mean()) for gradient in seen] == [0.5]
    (layer(plain) / 2).sum().backward()
    assert torch.equal(given.grad, plain.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_embeddings_output_is_no_leaf_however_blocks_are_recomputed(reentrant):
    net = models.llama(layers=2).requires_grad_(False)
    recompute_blocks(net, 1, reentrant)
    begin_at_embeddings(net)
    embedded = net.get_input_embeddings()(torch.tensor([[3, 4]]))
    assert embedded.requires_grad
    assert not embedded.is_leaf


def test_a_model_without_embeddings_is_left_alone():
    begin_at_embeddings(nn.Linear(2, 2))
