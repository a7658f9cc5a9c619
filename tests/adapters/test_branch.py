"""The adapted layer against PEFT's own: with and without dropout, main_grad and recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_one_dist.adapters.branch import ADAPTER, AdaptedLinear
from lora_one_dist.base.products import freeze_products
from tests import reference


class Block(nn.Module):
    """Two layers on one input, and one behind them, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20, bias=True), nn.Linear(12, 20), nn.Linear(20, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Writer(Block):
    """The same, in place: as Falcon adds its residual to what a target gave back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.up(x)
        product *= nn.functional.silu(self.gate(x))
        y = self.down(product)
        y += x
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.how: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return x


def build(dtype: torch.dtype, p: float, frozen_products: bool) -> tuple[Net, Net]:
    """PEFT's net and ours, of the same weights."""
    torch.manual_seed(5)
    net = Net().requires_grad_(False)
    lora = LoraConfig(r=3, lora_alpha=7, lora_dropout=p, use_rslora=True, target_modules=["gate", "up", "down"])
    inject_adapter_in_model(lora, net)
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.1)
    ours = copy.deepcopy(net)
    if frozen_products:
        freeze_products(ours)
    for layer in ours.modules():
        if isinstance(layer, LoraLayer):
            layer.__class__ = AdaptedLinear
    return net.to(dtype), ours.to(dtype)


def gradients(net: Net, how: bool | None) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(9)
    dtype = next(net.parameters()).dtype
    x = torch.randn(2, 5, 12).to(dtype).requires_grad_()
    net.how = how
    torch.manual_seed(10)
    y = net(x)
    (y.float().square().sum() / 100).backward()
    named = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, named


@pytest.mark.parametrize("frozen_products", [True, False])
@pytest.mark.parametrize("how", [None, True, False], ids=["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_gradients_equal_pefts(dtype, p, how, frozen_products):
    # bf16 rounds in other places: 4e-3 an element through two blocks.  Else the rounding of sums in another order.
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    pefts, ours = build(dtype, p, frozen_products)
    expected, found = gradients(pefts, how), gradients(ours, how)
    for truth, value in zip(expected[:2], found[:2], strict=True):
        assert reference.relative(value, truth) <= tolerance
    assert found[2].keys() == expected[2].keys()
    for name, truth in expected[2].items():
        assert reference.relative(found[2][name], truth) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_main_grad_and_left_nowhere_else(dtype):
    pefts, ours = build(dtype, 0.0, True)
    _, _, expected = gradients(pefts, False)
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.main_grad = torch.ones(parameter.shape)
    for _ in range(2):
        gradients(ours, False)
    for name, parameter in trained.items():
        assert parameter.grad is None
        assert parameter.grad_added_to_main_grad
        assert reference.relative((parameter.main_grad - 1) / 2, expected[name]) <= (
            1e-5 if dtype.itemsize == 4 else 3e-2
        )


@pytest.mark.parametrize("frozen_products", [True, False])
@pytest.mark.parametrize("how", [None, True, False], ids=["none", "reentrant", "non_reentrant"])
def test_a_models_own_code_may_write_to_the_output(how, frozen_products):
    ours, writers = (build(torch.float32, 0.0, frozen_products)[1] for _ in range(2))
    for block in writers.layers:
        block.__class__ = Writer
    expected, found = gradients(ours, how), gradients(writers, how)
    for truth, value in zip(expected[:2], found[:2], strict=True):
        assert reference.relative(value, truth) <= 1e-6
    for name, truth in expected[2].items():
        assert reference.relative(found[2][name], truth) <= 1e-6, name


def test_evaluation_neither_saves_nor_drops():
    pefts, ours = build(torch.float32, 0.4, True)
    x = torch.randn(5, 12)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), pefts.eval()(x), atol=1e-5)
