"""AdaLoRA's schedule, its choice over all layers, its regulariser and averages, each against plain numbers."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.base.targets import Target
from lora_one_dist.config.lora import LoraConfig
from lora_one_dist.train import adalora
from lora_one_dist.train.adalora import Allocation, BudgetError, allocation_of

SCHEDULE = Allocation(initial=96, target=64, first=10, last=90, interval=20, orthogonal=0.5)


@pytest.mark.parametrize(
    ("step", "left"),
    [
        (1, None),
        (10, None),  # the warm-up's last
        (11, None),  # no multiple of the interval
        (20, 85),  # 64 + 32 (1 - 10 / 80)^3 = 85.4
        (40, 71),  # 64 + 32 (1 - 30 / 80)^3 = 71.8
        (80, 64),  # 64 + 32 / 512 = 64.06
        (89, None),
        (90, 64),
        (91, 64),  # of the last steps each has the same mask
        (100, 64),
    ],
)
def test_the_budget_falls_by_the_cube_between_the_two_ends(step, left):
    assert SCHEDULE.left(step) == left


def test_without_ends_the_first_step_and_the_last_prune():
    whole = Allocation(12, 8, 0, 3, 1, 0.5)
    assert [whole.left(step) for step in (1, 2, 3)] == [9, 8, 8]


def targets(*ranks: int) -> list[Target]:
    return [Target(f"layer.{i}", 8, 8, r, 1.0, kind="adalora") for i, r in enumerate(ranks)]


def test_an_allocation_counts_the_triplets_that_the_layers_have():
    lora = LoraConfig(kind="adalora", r=6, adalora_warmup_steps=2, adalora_final_steps=3)
    assert allocation_of(lora, targets(6, 6, 2), 10) == Allocation(14, 12, 2, 7, 1, 0.5)
    assert allocation_of(LoraConfig(), targets(6), 10) is None


def test_a_schedule_without_a_step_to_prune_in_and_layers_without_enough_triplets_are_refused():
    lora = LoraConfig(kind="adalora", r=6, adalora_warmup_steps=4, adalora_final_steps=6)
    with pytest.raises(BudgetError, match=r"warmup_steps = 4, .*final_steps = 6: .*, the run has 10 steps. Lower them"):
        allocation_of(lora, targets(6, 6), 10)
    assert allocation_of(lora, targets(6, 6), 0) is not None, "no step is asked for"
    with pytest.raises(BudgetError, match="adalora_target_r = 4: 3 layers would keep 12 triplets and have 12"):
        allocation_of(lora, targets(6, 4, 2), 11)


def test_the_least_important_go_whichever_layer_has_them_and_of_equal_ones_all():
    scores = [5.0, 1.0, 3.0, 2.0, 2.0, 9.0]
    assert adalora.threshold(scores, 1) == 1.0
    assert adalora.threshold(scores, 2) == 2.0, "both of the two: three go where two should"
    assert adalora.threshold(reversed(scores), 4) == 3.0


def test_the_regularisers_gradient_is_autograds():
    torch.manual_seed(0)
    held = {"lora_A": torch.randn(3, 4, 9), "lora_B": torch.randn(3, 7, 4)}
    held["lora_A"][0] = torch.linalg.qr(torch.randn(9, 4)).Q.T  # near the minimum, where the norm has no gradient
    held["lora_A"][1] = torch.eye(4, 9)  # and at it
    before = {name: torch.randn_like(value) for name, value in held.items()}
    grads = {name: value.clone() for name, value in before.items()}
    adalora.add_orthogonal_gradient(held, grads, 0.3)
    leaves = {name: value.double().requires_grad_() for name, value in held.items()}
    A, B = leaves.values()
    off = [gram - torch.eye(4) for gram in (*(a @ a.T for a in A), *(b.T @ b for b in B))]
    (0.3 * sum(one.norm() for one in off)).backward()
    for name, leaf in leaves.items():
        clear = [k for k in range(3) if (name, k) != ("lora_A", 0)]  # there the direction is of rounding
        expected = before[name] + leaf.grad
        assert (grads[name] - expected)[clear].abs().max() < 3e-6, name
    assert torch.equal(grads["lora_A"][1], before["lora_A"][1])
    moved = (grads["lora_A"][0] - before["lora_A"][0]).norm()
    assert moved <= 0.6 * 1.001, "2 w ||U A|| with ||U||_F 1 and orthonormal A"


def test_averages_and_importances_are_the_papers(monkeypatch):
    monkeypatch.setattr(adalora, "PIECE", 5)  # a part of a row
    shapes = {"lora_A": (2, 3, 4), "lora_B": (2, 5, 3), "lora_E": (2, 3)}
    generator = torch.Generator().manual_seed(0)
    steps = [[{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in "vg"] for _ in range(3)]
    flat = [torch.zeros(2 * (12 + 15 + 3)) for _ in range(2)]

    def split(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = tensor.split([24, 30, 6])
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    sensitivity = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    uncertainty = {name: value.clone() for name, value in sensitivity.items()}
    for values, grads in steps:
        adalora.follow(*(torch.cat([x.flatten() for x in each.values()]) for each in (values, grads)), *flat)
        for name in shapes:
            now = (values[name] * grads[name]).double().abs()
            sensitivity[name] = 0.85 * sensitivity[name] + 0.15 * now
            uncertainty[name] = 0.85 * uncertainty[name] + 0.15 * (now - sensitivity[name]).abs()
    found = adalora.importance(*map(split, flat))
    for k in range(2):
        for i in range(3):
            A, B, E = (sensitivity[name][k] * uncertainty[name][k] for name in shapes)
            assert float(found[k, i]) == pytest.approx(float(E[i] + A[i].mean() + B[:, i].mean()), rel=1e-5)
