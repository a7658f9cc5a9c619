"""The toy experiments behind LoRA-One, with this package's initialisations and steps: seconds on a CPU.

A frozen layer W (m, n), linear or ReLU, must learn a low-rank shift D (m, n): the labels are those of W + D, the
adapters lora_A (r, n) and lora_B (m, r) are trained by gradient descent on all N samples at once,
``L = 1/(2N) sum ||f((W + B A) x) - y||^2``.  The paper has x' on the left, ``x' (W + A B)``: its A is our A', its B our
B', and what it calls left singular vectors of the gradient are our right ones.

The package's SVDs and initialisations are fp32, and so are the steps that :func:`precondition` returns; adapters,
gradients and risks are float64 here.  The rounding of a step is relative to the step, so it does not end convergence.

Source: arXiv 2502.01235v3, equation 3, theorems 3.1, 3.2, 3.3 and 4.2, figures 2 and 4, appendix G.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from lora_one_dist.config.seeds import seed_of
from lora_one_dist.initialise import spectral
from lora_one_dist.train.precondition import precondition
from lora_one_dist.train.updates import sgd_

Pair = tuple[torch.Tensor, torch.Tensor]
SVD_TOLERANCE = 1e-3  # init.svd_tolerance's default; matrices of this size get a full SVD
DAMPING = 1e-6  # arXiv 2402.02347 and the authors' configuration
RELU_GAMMA = 2.0  # theorem 4.2: a ReLU halves the gradient
RELU_SHIFT = 0.1  # ||D||_2 over ||W||_2
REACHED = 1e-8  # risk that conditioning counts steps to
KINDS: tuple[tuple[str, float | None], ...] = ((", preconditioned", DAMPING), ("", None))


@dataclass(frozen=True)
class Settings:
    """Sizes and steps of the experiments; the defaults are the paper's setting."""

    seeds: tuple[int, ...] = tuple(range(10))
    size: int = 100
    """m = n of the linear layer (the paper's d = k)."""
    samples: int = 1600
    r: int = 8
    rank: int = 4
    """Of the shift D."""
    variances: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001, 0.0001)
    """Of A0's elements (alignment)."""
    alignment_steps: int = 1500
    initialisation_steps: int = 500
    conditions: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Condition numbers of D (conditioning)."""
    conditioning_steps: int = 200
    relu_size: int = 20
    relu_samples: int = 20_000
    relu_r: int = 2
    """Rank of the adapter and of D."""
    relu_conditions: tuple[float, ...] = (1.0, 4.0, 20.0)
    relu_steps: int = 60


@dataclass
class Result:
    """What an experiment measured, one value a seed."""

    rows: dict[str, list[float]] = field(default_factory=dict)
    """By quantity."""
    curves: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name, (steps + 1, seeds)."""


# Problems and descent -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """k linear layers to adapt: shifts D (k, m, n), and the second moments X'X / N (k, n, n) of their inputs.

    W cancels: the residual of a sample is (B A - D) x.
    """

    D: torch.Tensor
    moments: torch.Tensor

    @cached_property
    def gradient(self) -> torch.Tensor:
        """dL/dW (k, m, n) at the pre-trained weights: the one-step full gradient."""
        return -self.D @ self.moments

    def slope(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """dL/d(BA) (k, m, n)."""
        return B @ (A @ self.moments) + self.gradient

    def risk(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Expected loss on new inputs, ``1/2 ||B A - D||_F^2``, (k,)."""
        return (B @ A - self.D).square().sum((-2, -1)) / 2

    def compensated(self, A0: torch.Tensor, B0: torch.Tensor) -> Linear:
        """The same on a base W - B0 A0: what is left to learn is D + B0 A0."""
        return Linear(self.D + B0 @ A0, self.moments)


@dataclass(frozen=True)
class Relu:
    """k shifts D (k, m, n) of one ReLU layer W (m, n) to learn from the same inputs X (N, n)."""

    X: torch.Tensor
    W: torch.Tensor
    D: torch.Tensor

    @cached_property
    def labels(self) -> torch.Tensor:
        """(k, N, m)."""
        return (self.X @ (self.W + self.D).mT).relu_()

    def slope(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """dL/d(BA) (k, m, n); at B = 0 the one-step full gradient."""
        reached = self.X @ (self.W + B @ A).mT
        return reached.relu().sub_(self.labels).mul_(reached > 0).mT @ self.X / len(self.X)

    def error(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """``||B A - D||_F / ||D||_F``, (k,)."""
        return torch.linalg.matrix_norm(B @ A - self.D) / torch.linalg.matrix_norm(self.D)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def shift(size: int, values: Sequence[float], generator: torch.Generator) -> torch.Tensor:
    """A random (size, size) matrix with these singular values."""
    left, right = (orthonormal(size, len(values), generator) for _ in range(2))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def linear(settings: Settings, values: Sequence[float]) -> Linear:
    """A linear problem for each seed, D with these singular values."""
    shifts, moments = [], []
    for seed in settings.seeds:
        generator = torch.Generator().manual_seed(seed_of(seed, "linear"))
        shifts.append(shift(settings.size, values, generator))
        X = torch.randn(settings.samples, settings.size, generator=generator, dtype=torch.float64)
        moments.append(X.T @ X / settings.samples)
    return Linear(torch.stack(shifts), torch.stack(moments))


def relu_problem(settings: Settings, seed: int) -> Relu:
    """A ReLU layer W ~ N(0, 1) and a shift of each condition number, ``||D||_2 = 0.1 ||W||_2``."""
    generator = torch.Generator().manual_seed(seed_of(seed, "relu"))
    X = torch.randn(settings.relu_samples, settings.relu_size, generator=generator, dtype=torch.float64)
    W = torch.randn(settings.relu_size, settings.relu_size, generator=generator, dtype=torch.float64)
    norm = RELU_SHIFT * float(torch.linalg.matrix_norm(W, 2))
    values = [geometric(condition, settings.relu_r) for condition in settings.relu_conditions]
    return Relu(X, W, torch.stack([norm * shift(settings.relu_size, of, generator) for of in values]))


def geometric(condition: float, count: int) -> list[float]:
    """``count`` values from 1 down to 1 / condition."""
    return [condition ** (-i / (count - 1)) for i in range(count)]


def descend(
    start: Pair,
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    lr: float,
    steps: int,
    damping: float | None = None,
) -> torch.Tensor:
    """Gradient descent from A0 (k, r, n), B0 (k, m, r); what ``look`` sees before each step and at the end.

    damping: of the preconditioner; None trains without it.
    """
    A, B = (tensor.double().clone() for tensor in start)
    seen = [look(A, B)]
    for _ in range(steps):
        J = slope(A, B)
        grads = B.mT @ J, J @ A.mT
        if damping is not None:
            grads = precondition(A, B, *grads, damping)
        for parameter, grad in zip((A, B), grads, strict=True):
            sgd_(parameter, grad, lr, 0.0)
        seen.append(look(A, B))
    return torch.stack(seen)


# Starts ---------------------------------------------------------------------------------------------------------------


def gaussian(seeds: Sequence[int], size: int, r: int, variance: float) -> Pair:
    """The paper's LoRA: A0 ~ N(0, variance), B0 = 0, for each seed."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_of(seed, "lora"))
        drawn.append(torch.randn(r, size, generator=generator, dtype=torch.float64) * math.sqrt(variance))
    return torch.stack(drawn), torch.zeros(len(drawn), size, r, dtype=torch.float64)


def kaiming(settings: Settings) -> Pair:
    """The package's plain LoRA for each seed."""
    pairs = [spectral.kaiming(settings.size, settings.size, settings.r, seed) for seed in settings.seeds]
    return _stacked(pairs)


def from_gradient(G: torch.Tensor, r: int, method: Callable[[spectral.TruncatedSVD], Pair]) -> Pair:
    """A spectral initialisation of the package for each gradient (k, m, n)."""
    return _stacked([method(svd) for svd in decompose(G, r)])


def decompose(G: torch.Tensor, r: int) -> list[spectral.TruncatedSVD]:
    """2r triplets of each, as LoRA-GA needs them.  Those beyond G's rank are what the SVD's rounding makes of them."""
    return [spectral.truncated_svd(one, 2 * r, seed=0, tolerance=SVD_TOLERANCE) for one in G]


def _stacked(pairs: Sequence[Pair]) -> Pair:
    A, B = (torch.stack(side).double() for side in zip(*pairs, strict=True))
    return A, B


# Experiments ----------------------------------------------------------------------------------------------------------


def alignment(settings: Settings) -> Result:
    """Plain LoRA finds the gradient's top space by itself: B at once, A the better the smaller it starts.

    D has ``rank`` singular values 1; GD with lr 1/64.  Theorems 3.1 and 3.2, figure 2.
    """
    result = Result()
    problem = linear(settings, [1.0] * settings.rank)
    U, _, Vh = torch.linalg.svd(problem.gradient, full_matrices=False)
    U, Vh = U[..., : settings.rank], Vh[..., : settings.rank, :]

    def look(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        outside = torch.linalg.matrix_norm(B - U @ (U.mT @ B)) / torch.linalg.matrix_norm(B).clamp_min(1e-300)
        return torch.stack([_sine(A, Vh), outside, problem.risk(A, B)])

    largest = torch.zeros(len(settings.seeds), dtype=torch.float64)
    for variance in settings.variances:
        start = gaussian(settings.seeds, settings.size, settings.r, variance)
        sines, outside, risks = descend(start, problem.slope, look, 1 / 64, settings.alignment_steps).unbind(1)
        result.curves[f"{variance:g}"] = sines
        result.rows[f"least sine, variance {variance:g}"] = sines.min(0).values.tolist()
        result.rows[f"risk at the end, variance {variance:g}"] = risks[-1].tolist()
        largest = torch.maximum(largest, outside.max(0).values)
    result.rows["share of B outside, largest"] = largest.tolist()
    return result


def _sine(A: torch.Tensor, Vh: torch.Tensor) -> torch.Tensor:
    """Of the largest angle between A's top right singular space and the rows of Vh (k, q, n), right to 1e-8; (k,)."""
    q = Vh.shape[-2]
    squares, vectors = torch.linalg.eigh(A @ A.mT)
    top = A.mT @ (vectors[..., -q:] / squares[..., None, -q:].sqrt())
    outside = top - Vh.mT @ (Vh @ top)
    return torch.linalg.eigvalsh(outside.mT @ outside)[..., -1].clamp_min(0).sqrt()


def initialisation(settings: Settings) -> Result:
    """Where a start leads under GD with lr 0.1: LoRA-GA and LoRA-SB stay in a space that lacks a part of D.

    D's singular values are (4, 3, 2, 1) / 4.  Figure 4; the floors follow from the shapes alone.
    """
    result = Result()
    size, r, steps = settings.size, settings.r, settings.initialisation_steps
    problem = linear(settings, [1 - i / settings.rank for i in range(settings.rank)])

    def measure(name: str, start: Pair, of: Linear = problem, damping: float | None = None) -> None:
        result.curves[name] = descend(start, of.slope, of.risk, 0.1, steps, damping)

    one = from_gradient(problem.gradient, r, partial(spectral.lora_one, r=r, gamma=1.0))
    measure("LoRA-One", one)
    measure("LoRA-One, preconditioned", one, damping=DAMPING)
    first = from_gradient(problem.gradient, r, partial(spectral.lora_one_v1, r=r, gamma=64.0))
    measure("LoRA-One v1, preconditioned", first, problem.compensated(*first), DAMPING)
    plain = gaussian(settings.seeds, size, r, 1 / size)
    measure("LoRA", plain)
    measure("LoRA, preconditioned", plain, damping=DAMPING)
    measure("LoRA, Kaiming", kaiming(settings))
    for gamma in (4.0, 16.0, 64.0):
        form = partial(spectral.lora_ga, r=r, scheme="arb2r", scale=spectral.stable_scale(size, gamma))
        start = from_gradient(problem.gradient, r, form)
        moved = problem.compensated(*start)
        name = f"LoRA-GA, gamma {gamma:g}"
        measure(name, start, moved)
        result.rows[f"floor of {name}"] = (torch.linalg.svdvals(moved.D)[:, r:].square().sum(-1) / 2).tolist()
        result.rows[f"risk of {name} at the least loss"] = least_of_rank(moved, r).tolist()
    _lora_sb(problem, r, steps, result)
    for name, curve in result.curves.items():
        for step in (50, steps):
            result.rows[f"{name}, step {step}"] = curve[min(step, steps)].tolist()
    return result


def least_of_rank(problem: Linear, r: int) -> torch.Tensor:
    """Risk (k,) of the product of rank r with the least loss ``1/2 ||(B A - D) L||_F^2``, where X'X / N = L L'."""
    L = torch.linalg.cholesky(problem.moments)
    U, S, Vh = torch.linalg.svd(problem.D @ L, full_matrices=False)
    best = U[..., :r] * S[..., None, :r] @ Vh[..., :r, :]
    return (torch.linalg.solve_triangular(L, best, upper=False, left=False) - problem.D).square().sum((-2, -1)) / 2


def _lora_sb(problem: Linear, r: int, steps: int, result: Result) -> None:
    """LoRA-SB: U (m, r) and Vh (r, n) of the gradient stay, R (r, r) in ``W + U R Vh`` trains.  arXiv 2411.19557."""
    svds = decompose(problem.gradient, r)
    U, Vh = (torch.stack(side).double() for side in zip(*((s.U[:, :r], s.Vh[:r]) for s in svds), strict=True))
    R = torch.stack([-torch.diag(svd.S[:r] / svd.S[0]) for svd in svds]).double()
    seen = [problem.risk(Vh, U @ R)]
    for _ in range(steps):
        sgd_(R, U.mT @ problem.slope(Vh, U @ R) @ Vh.mT, 0.1, 0.0)
        seen.append(problem.risk(Vh, U @ R))
    result.curves["LoRA-SB"] = torch.stack(seen)
    missed = problem.D - problem.D @ Vh.mT @ Vh
    result.rows["floor of LoRA-SB"] = (missed.square().sum((-2, -1)) / 2).tolist()
    least = torch.linalg.solve(Vh @ problem.moments @ Vh.mT, -U.mT @ problem.gradient @ Vh.mT, left=False)
    result.rows["risk of LoRA-SB at the least loss"] = problem.risk(Vh, U @ least).tolist()


def conditioning(settings: Settings) -> Result:
    """Steps to a risk below 1e-8 at lr 0.5: D's condition number costs GD steps, preconditioned GD none.

    D's singular values are geometric from 1 to 1 / condition.  Appendix C.3; arXiv 2402.02347.
    """
    result = Result()
    for condition in settings.conditions:
        problem = linear(settings, geometric(condition, settings.rank))
        one = from_gradient(problem.gradient, settings.r, partial(spectral.lora_one, r=settings.r, gamma=1.0))
        plain = gaussian(settings.seeds, settings.size, settings.r, 1 / settings.size)
        for name, start in (("LoRA-One", one), ("LoRA", plain)):
            for how, damping in KINDS:
                risks = descend(start, problem.slope, problem.risk, 0.5, settings.conditioning_steps, damping)
                result.curves[f"{name}{how}, condition {condition:g}"] = risks
                result.rows[f"{name}{how}, condition {condition:g}"] = [
                    first_below(curve, REACHED) for curve in risks.T
                ]
    return result


def first_below(curve: torch.Tensor, level: float) -> float:
    """The first step at which a curve lies below a level; infinity if it never does."""
    below = (curve < level).nonzero()
    return float(below[0]) if below.numel() else math.inf


def relu(settings: Settings) -> Result:
    """The same for a ReLU layer, r the rank of D, lr 0.5: relative error ``||B A - D||_F / ||D||_F``.

    LoRA-One starts at ``gamma`` times the rank-r part of -G, gamma 2.  Theorem 4.2.
    """
    result = Result()
    of_seed: dict[str, list[torch.Tensor]] = {}
    for seed in settings.seeds:
        for name, curve in _relu_curves(settings, seed).items():
            of_seed.setdefault(name, []).append(curve)
    result.curves = {name: torch.stack(curves, 1) for name, curves in of_seed.items()}
    for name, curve in result.curves.items():
        for step in sorted({0, settings.relu_steps // 2, settings.relu_steps}):
            result.rows[f"{name}, step {step}"] = curve[step].tolist()
    return result


def _relu_curves(settings: Settings, seed: int) -> dict[str, torch.Tensor]:
    """Errors (steps + 1,) of one seed, all condition numbers descending side by side."""
    problem, size, r = relu_problem(settings, seed), settings.relu_size, settings.relu_r
    A0, B0 = (start.expand(len(problem.D), -1, -1) for start in gaussian((seed,), size, r, 1 / size))
    # lora_one divides by the largest singular value and by gamma; theorem 4.2 multiplies -G by its own gamma.
    one = from_gradient(
        problem.slope(A0, B0), r, lambda svd: spectral.lora_one(svd, r, 1 / (RELU_GAMMA * float(svd.S[0])))
    )
    curves = {}
    for name, start in (("LoRA-One", one), ("LoRA", (A0, B0))):
        for how, damping in KINDS:
            errors = descend(start, problem.slope, problem.error, 0.5, settings.relu_steps, damping)
            curves.update(
                {f"{name}{how}, condition {c:g}": errors[:, i] for i, c in enumerate(settings.relu_conditions)}
            )
    return curves


EXPERIMENTS: dict[str, Callable[[Settings], Result]] = {
    "alignment": alignment,
    "initialisation": initialisation,
    "conditioning": conditioning,
    "relu": relu,
}
