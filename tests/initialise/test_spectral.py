"""Spectral initialisations against a full float64 SVD."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model

from lora_one_dist.initialise import spectral
from tests.reference import relative

TOLERANCE = 1e-4  # the issue's; fp32 SVD rounding at these conditions is 1e-6 to 1e-5
TOP_GAMMA = 128.0


def matrix(m: int, n: int, exponent: float, seed: int = 0) -> torch.Tensor:
    """Random singular vectors, spectrum i^-exponent: what gradients of language models look like, but for the scale."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return ((U * torch.arange(1, k + 1, dtype=torch.float64) ** -exponent) @ V.T * 1e-3).float()


def exact(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.linalg.svd(G.double(), full_matrices=False)


CASES = [(96, 160, 8), (160, 96, 8), (700, 1200, 16), (1200, 700, 4), (48, 48, 24)]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    m, n, r = request.param
    G = matrix(m, n, 0.7)
    return G, r, exact(G), spectral.truncated_svd(G, 2 * r, seed=1, tolerance=1e-3)


def test_lora_one_is_a_normalised_step_down(case):
    G, r, (U, S, Vh), svd = case
    A0, B0 = spectral.lora_one(svd, r, TOP_GAMMA)
    truth = -(U[:, :r] * (S[:r] / S[0])) @ Vh[:r] / TOP_GAMMA
    assert relative(B0 @ A0, truth) <= TOLERANCE
    assert float((G.double() * (B0 @ A0).double()).sum()) < 0, "the product must point down the gradient"
    assert torch.linalg.matrix_norm(B0 @ A0, 2).item() == pytest.approx(1 / TOP_GAMMA, rel=TOLERANCE)
    assert relative(A0 @ A0.T, B0.T @ B0) <= TOLERANCE, "A0 and B0 are balanced"


def test_lora_one_v1(case):
    G, r, (U, _, Vh), svd = case
    A0, B0 = spectral.lora_one_v1(svd, r, 64.0)
    assert relative(B0 @ A0, U[:, :r] @ Vh[:r] * math.sqrt(G.shape[0]) / 64.0) <= TOLERANCE


def test_lora_ga_spans_the_two_spaces(case):
    G, r, (U, _, Vh), svd = case
    A0, B0 = (x.double() for x in spectral.lora_ga(svd, r, "arb2r", spectral.stable_scale(G.shape[0], 16.0)))
    scale = math.sqrt(G.shape[0]) / 16.0
    assert relative(A0.T @ A0 / scale, Vh[:r].T @ Vh[:r]) <= TOLERANCE
    assert relative(B0 @ B0.T / scale, U[:, r : 2 * r] @ U[:, r : 2 * r].T) <= TOLERANCE


# Which of the first 2r triplets go where (0-based), as the authors' code has them.
SCHEMES = {
    "arb2r": lambda r: (range(r), range(r, 2 * r)),
    "a2rbr": lambda r: (range(r, 2 * r), range(r)),
    "arbr": lambda r: (range(1, 2 * r, 2), range(0, 2 * r, 2)),
}
PEFT_NAMES = {"arb2r": "ArB2r", "a2rbr": "A2rBr", "arbr": "ArBr"}
ONE_ROUNDING = 1e-6  # of fp32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_of_lora_ga(scheme, case):
    """The vectors are as named; and a step of gradient descent takes the best rank-2r part of G with any of them."""
    G, r, (U, S, Vh), svd = case
    right, left = SCHEMES[scheme](r)
    s, scale = 2.5, 1 / 2.5
    A0, B0 = (x.double() for x in spectral.lora_ga(svd, r, scheme, scale))
    assert relative(A0, scale * svd.Vh.double()[[*right]]) <= ONE_ROUNDING
    assert relative(B0, scale * svd.U.double()[:, [*left]]) <= ONE_ROUNDING
    moved = s * (B0 @ (s * B0.T @ G.double()) + (s * G.double() @ A0.T) @ A0)  # of s B A, at rate -1
    assert relative(moved, (U[:, : 2 * r] * S[: 2 * r]) @ Vh[: 2 * r]) <= TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES)
def test_directions_are_those_of_peft(scheme):
    """With PEFT's gd_scale A0 is the same but for signs; of B0 the directions are, since PEFT multiplies B by S."""
    G, r, alpha = matrix(40, 64, 0.7), 10, 25  # q = 4r is the whole of G
    model = torch.nn.Sequential(torch.nn.Linear(64, 40, bias=False))
    model[0]._peft_loraga_grad = G
    ga = LoraGAConfig(direction=PEFT_NAMES[scheme], scale="gd_scale")
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=ga)
    layer = get_peft_model(model, config).base_model.model[0]
    theirs_A, theirs_B = (x["default"].weight.detach().double() for x in (layer.lora_A, layer.lora_B))
    svd = spectral.truncated_svd(G, 2 * r, seed=1, tolerance=1e-3)
    A0, B0 = (x.double() for x in spectral.lora_ga(svd, r, scheme, r / alpha))
    signs = (A0 * theirs_A).sum(1, keepdim=True).sign()
    assert relative(A0, signs * theirs_A) <= TOLERANCE
    directions = torch.nn.functional.normalize(theirs_B, dim=0)
    assert relative(B0 / B0.norm(dim=0), (B0 * directions).sum(0).sign() * directions) <= TOLERANCE


def test_random_directions():
    A0, B0 = spectral.random_directions(50, 400, 8, scale=0.5, seed=3)
    assert (A0.shape, B0.shape) == ((8, 400), (50, 8))
    for gram in (A0.double() @ A0.T.double(), B0.T.double() @ B0.double()):
        assert relative(gram, 0.25 * torch.eye(8)) <= ONE_ROUNDING
    other, _ = spectral.random_directions(50, 400, 8, scale=0.5, seed=4)
    assert float((other @ A0.T).norm() / (A0 @ A0.T).norm()) < 0.3  # of unrelated spaces about sqrt(8 / 400)


def test_pissa_is_the_best_rank_r_part(case):
    _, r, (U, S, Vh), svd = case
    A0, B0 = spectral.pissa(svd, r, scaling=2.5)
    assert relative(2.5 * B0 @ A0, (U[:, :r] * S[:r]) @ Vh[:r]) <= TOLERANCE


@pytest.mark.full
def test_large_gradient_at_rank_64():
    G = matrix(2048, 2048, 0.7, seed=3)
    U, S, Vh = exact(G)
    svd = spectral.truncated_svd(G, 64, seed=2, tolerance=1e-3)
    assert svd.blocks > 0, "the randomised road"
    for A0, B0, truth in (
        (*spectral.lora_one(svd, 64, 128.0), -(U[:, :64] * (S[:64] / S[0])) @ Vh[:64] / 128.0),
        (*spectral.lora_one_v1(svd, 64, 64.0), U[:, :64] @ Vh[:64] * math.sqrt(2048) / 64.0),
        (*spectral.pissa(svd, 64, 2.0), (U[:, :64] * S[:64]) @ Vh[:64] / 2.0),
    ):
        assert relative(B0 @ A0, truth) <= TOLERANCE
    assert _error_over_optimal(G, svd, S, 64) <= 1 + TOLERANCE
    A0, B0 = spectral.lora_ga(
        spectral.truncated_svd(G, 128, seed=2, tolerance=1e-3), 64, "arb2r", spectral.stable_scale(2048, 16.0)
    )
    scale = math.sqrt(2048) / 16.0
    assert relative(A0.double().T @ A0.double() / scale, Vh[:64].T @ Vh[:64]) <= TOLERANCE
    assert relative(B0.double() @ B0.double().T / scale, U[:, 64:128] @ U[:, 64:128].T) <= TOLERANCE


def test_open_gap_is_measured_by_the_error():
    """With (S_r - S_{r+1}) / S_r below SMALL_GAP no space is the right one; the approximation must still be optimal."""
    G = matrix(600, 900, 0.05)
    S = exact(G)[1]
    r = 16
    assert float((S[r - 1] - S[r]) / S[r - 1]) < spectral.SMALL_GAP
    svd = spectral.truncated_svd(G, r, seed=5, tolerance=1e-3)
    assert svd.gap < spectral.SMALL_GAP
    assert _error_over_optimal(G, svd, S, r) <= 1 + TOLERANCE


def _error_over_optimal(G, svd, S, r):
    approximation = (svd.U[:, :r] * svd.S[:r]).double() @ svd.Vh[:r].double()
    return float((G.double() - approximation).norm() / S[r:].square().sum().sqrt())


def test_certificate_bounds_the_angle(case):
    G, r, (_, _, Vh), _ = case
    svd = spectral.truncated_svd(G, r, seed=7, tolerance=1e-3)
    sine = torch.linalg.matrix_norm(Vh[:r].T @ (Vh[:r] @ svd.Vh[:r].double().T) - svd.Vh[:r].double().T, 2)
    assert float(sine) <= 2 * svd.error + 1e-6, "2: Davis-Kahan for singular spaces; 1e-6: fp32 rounding of the vectors"


@pytest.mark.parametrize("size", [(1200, 1500), (1500, 1200)])
def test_certificate_catches_a_wrong_space(size):
    """The first space of a flat spectrum misses what it looks for on either side, and the certificate must say so."""
    G = matrix(*size, 0.1)
    U, _, Vh = exact(G)
    svd = spectral.truncated_svd(G, 16, seed=0, tolerance=math.inf)
    for true, found in ((U[:, :16], svd.U.double()), (Vh[:16].T, svd.Vh.double().T)):
        assert float(torch.linalg.matrix_norm(found - true @ (true.T @ found), 2)) > 0.1
    assert svd.error > 0.1


def test_iterates_until_certified():
    G = matrix(900, 1100, 0.1)
    first = spectral.truncated_svd(G, 8, seed=1, tolerance=math.inf)
    best = spectral.truncated_svd(G, 8, seed=1, tolerance=1e-3)
    assert 0 < first.blocks < best.blocks
    assert best.error < first.error / 2


def test_reproducible_and_leaves_the_global_generator_alone():
    G = matrix(700, 800, 0.7)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = spectral.truncated_svd(G, 8, seed=9, tolerance=1e-3)
    assert torch.equal(torch.rand(3), expected)
    again = spectral.truncated_svd(G, 8, seed=9, tolerance=1e-3)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.Vh, again.Vh)


def test_signs_do_not_depend_on_the_sign_of_the_sketch():
    G = matrix(700, 800, 0.7)
    one, other = (spectral.truncated_svd(G, 8, seed=seed, tolerance=1e-6) for seed in (1, 2))
    assert relative(one.Vh[:8], other.Vh[:8]) <= TOLERANCE
    assert relative(one.U[:, :8], other.U[:, :8]) <= TOLERANCE


def test_gaussian_is_adalora():
    A0, B0 = spectral.gaussian(400, 500, 8, seed=3)
    assert A0.shape == (8, 500)
    assert B0.shape == (400, 8)
    for drawn in (A0, B0):
        assert abs(float(drawn.mean())) < 1e-3
        assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(A0, spectral.gaussian(400, 500, 8, seed=3)[0])


def test_kaiming_is_lora():
    A0, B0 = spectral.kaiming(50, 400, 8, seed=3)
    assert not B0.any()
    assert A0.abs().max() <= 1 / math.sqrt(400)
    assert A0.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)  # of a uniform; 3200 draws: 1 %


def test_values_beyond_r_give_the_coverage():
    """The table by which users choose r goes on beyond it: values there are lower bounds, energies right to 3 %."""
    for exponent in (0.2, 0.5, 1.0):
        G = matrix(1024, 1400, exponent)
        S = exact(G)[1]
        svd = spectral.truncated_svd(G, 8, seed=1, tolerance=1e-3)
        k = svd.S.numel()
        assert 16 <= k < 128
        assert (svd.S.double() <= S[:k] * (1 + 1e-5)).all()
        assert 0.97 <= float(svd.S.double().square().sum() / S[:k].square().sum()) <= 1 + 1e-5


def test_norm_counts_every_element():
    """Of a matrix that is added up in several parts."""
    matrix = torch.randn(1000, 300, generator=torch.Generator().manual_seed(8))
    assert matrix.numel() > spectral.NORM_CHUNK["cpu"]
    assert spectral.frobenius_norm(matrix) == pytest.approx(float(matrix.double().square().sum().sqrt()), rel=1e-12)
    matrix[-1, -1] = math.inf
    assert spectral.frobenius_norm(matrix) == math.inf


def test_coverage_and_overlap():
    G = matrix(96, 160, 0.7)
    svd = spectral.truncated_svd(G, 8, seed=1, tolerance=1e-3)
    S = exact(G)[1]
    covered = spectral.coverage(svd.S, float(G.double().square().sum()), (1, 8, 96, 128))
    assert covered[8] == pytest.approx(float(S[:8].square().sum() / S.square().sum()), rel=1e-5)
    assert covered[96] == pytest.approx(1.0, rel=1e-5)
    assert 128 not in covered
    assert spectral.subspace_overlap(svd, svd, 8) == pytest.approx(1.0, rel=1e-5)
    other = spectral.truncated_svd(matrix(96, 160, 0.7, seed=8), 8, seed=1, tolerance=1e-3)
    assert spectral.subspace_overlap(svd, other, 8) < 0.3  # unrelated spaces: about 8/96 and 8/160
