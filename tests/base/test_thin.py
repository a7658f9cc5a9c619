"""Weights that fill no memory: what products with them are, and how much they hold."""

from __future__ import annotations

import torch
from torch import nn

from lora_one_dist.base.thin import ThinProducts, fill_thinly


def wide() -> nn.Module:
    with torch.device("meta"):
        net = nn.Sequential(nn.Embedding(50_000, 300), nn.Linear(300, 70_000), nn.Linear(8, 8, bias=False))
    net[2].weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    net.register_buffer("table", torch.arange(4.0, dtype=torch.bfloat16))
    return net


def test_no_memory_and_all_in_fp32():
    net = wide()
    fill_thinly(net)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}
    assert sum(storages.values()) < 2**20, "of 84 MB that the embedding and the layer would take"
    assert {tensor.dtype for tensor in (*net.parameters(), *net.buffers())} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())


def test_tied_weights_stay_tied():
    net = wide()
    net.append(nn.Linear(300, 50_000, bias=False, device="meta"))
    net[3].weight = net[0].weight
    fill_thinly(net)
    assert net[3].weight is net[0].weight


def test_products_take_each_row_by_itself_and_go_back_the_same_way():
    net = wide()
    fill_thinly(net)
    rows = torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(1))
    other = rows.clone()
    other[:, 3] += 1
    with ThinProducts():
        one, two = net[1](rows), net[1](other)
        seen = rows.clone().requires_grad_()
        net[1](seen)[:, 3].sum().backward()
    changed = (one - two).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, False, False, True, False, False]
    assert one.std() > 0.1, "one scale with its input"
    assert (seen.grad.abs().amax((0, 2)) > 0).tolist() == changed.tolist()


def test_small_weights_are_as_ever():
    net = wide()
    fill_thinly(net)
    rows = torch.randn(3, 8)
    with ThinProducts():
        found = net[2](rows)
    assert torch.equal(found, rows @ net[2].weight.T)
