"""The study's forms of the preconditioner against the package's own, and against what defines the others."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.train import optim
from lora_one_dist.train.precondition import precondition
from tools.study import forms, hessian

K, R, M, N = 3, 4, 10, 6
BETAS, EPS = (0.9, 0.999), 1e-8


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, R, N, generator=generator), torch.randn(K, M, R, generator=generator)


def moments() -> tuple[forms.Moments, forms.Moments]:
    shapes = ((K, R, N), (K, R, M))
    made = [forms.Moments(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
    return made[0], made[1]


def walk(form: forms.Form, steps: int = 5, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Where some steps on given gradients end."""
    (A, B), kept = pair(start), moments()
    for step in range(1, steps + 1):
        found = forms.steps_of_pairs(A, B, *pair(10 + step), kept, step, BETAS, EPS, form, 1.2 - step / 5)
        A, B = A - 0.1 * found[0], B - 0.1 * found[1]
    return A, B


@pytest.mark.parametrize("name", ["none", "paper", "damping 1", "rescaled, relative 1"])
def test_the_package_s_own_forms_are_the_package_s(name):
    (A, B), form = pair(0), forms.FORMS[name]
    kept = [torch.zeros_like(t) for t in (A, A, B, B)]
    for step in range(1, 6):
        grads = pair(10 + step)
        if name != "none":
            grads = precondition(A, B, *grads, form.damping, form.rescale)
        for value, grad, first, second in ((A, grads[0], *kept[:2]), (B, grads[1], *kept[2:])):
            optim.adamw_(value, grad, first, second, step, 0.1, BETAS, EPS, 0.0)
    # fp32 steps of 0.1 in another order of operations: 6e-8 each, times the condition of a Gram.
    for ours, theirs in zip(walk(form), (A, B), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_form_gives_finite_steps_and_is_a_form_of_its_own():
    ends = {name: walk(form) for name, form in forms.FORMS.items()}
    for name, end in ends.items():
        assert all(bool(tensor.isfinite().all()) for tensor in end), name
        assert [other for other in ends if torch.equal(ends[other][0], end[0])] == [name]


def test_a_rescaled_step_keeps_its_size():
    (A, B), grads = pair(0), pair(1)
    given = forms.steps_of_pairs(A, B, *grads, moments(), 1, BETAS, EPS, forms.FORMS["after"])
    for step in given:  # AdamW's first step is the sign of the gradient: its norm is the root of its entries
        torch.testing.assert_close(torch.linalg.matrix_norm(step), torch.full((K,), float(step[0].numel()) ** 0.5))


def test_around_s_products_do_not_depend_on_the_pair_s_basis_when_whitened():
    """B Q and Q' A are the same product; with an orthogonal Q the whitened form moves it alike."""
    (A, B), grads = pair(0), pair(1)
    Q = torch.linalg.qr(torch.randn(K, R, R, generator=torch.Generator().manual_seed(5))).Q
    form = forms.FORMS["whitened (LoRA-RITE)"]
    one = forms.steps_of_pairs(A, B, *grads, moments(), 1, BETAS, EPS, form)
    other = forms.steps_of_pairs(Q.mT @ A, B @ Q, Q.mT @ grads[0], grads[1] @ Q, moments(), 1, BETAS, EPS, form)
    torch.testing.assert_close(B @ one[0], B @ Q @ other[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one[1] @ A, other[1] @ Q.mT @ A, rtol=1e-4, atol=1e-4)


def test_lanczos_finds_the_largest_eigenvalue():
    Q = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0))).Q
    values = torch.cat([torch.linspace(-1, 1, 58), torch.tensor([3.0, 7.0])])
    matrix = (Q * values) @ Q.T
    largest, smallest, iterations = hessian.largest_eigenvalue(lambda v: matrix @ v, 60)
    assert largest == pytest.approx(7.0, rel=hessian.TOLERANCE)
    assert -1.0 - 1e-5 <= smallest < 0, "a Ritz value lies inside"
    assert iterations < 30
