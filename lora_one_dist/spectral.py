"""Truncated SVD and every spectral initialisation: pure functions of one matrix.

In: a gradient G or a weight W (m, n), fp32, on one rank.  Out: ``A0 (r, n)``, ``B0 (m, r)``, fp32, for the forward
``W x + s B0 A0 x``.  Nothing here knows of ranks or files.  Peak bytes: the matrix, plus ``4 q (m + n)`` x 3 for a
randomised SVD of q columns, plus ``4 (m + n) min(m, n)`` for a full one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

MIN_SKETCH = 256  # columns q = max(4 r, 256): top-64 angle 2.3e-4 at 4096 x 4096, spectrum i^-0.7, FIRST_ITERATIONS
FIRST_ITERATIONS = 4  # power iterations; none at all misses the space (sine 0.5 to 1)
MAX_ITERATIONS = 32
# Singular triplets in fp32 leave a residual of about this times S_1 however long one iterates (measured: 6 to 9 eps).
RESIDUAL_FLOOR = 10 * torch.finfo(torch.float32).eps
SMALL_GAP = 1e-2  # (S_r - S_{r+1}) / S_r below which the top-r space is not determined by the matrix


@dataclass(frozen=True)
class TruncatedSVD:
    """``U (m, k), S (k,), Vh (k, n)`` of the k largest singular values, with a certificate for the first r.

    error: ``max_{i<=r} max(||G v_i - S_i u_i||, ||G' u_i - S_i v_i||) / (S_r - S_{r+1})``, which tracks the sine of the
    angle to the exact top-r space (Wedin); both sides, since svd_lowrank makes one of them zero by construction, and
    which one depends on m < n.  Where the gap is below SMALL_GAP of S_r the space is not determined and SMALL_GAP * S_r
    takes the gap's place.  gap: ``(S_r - S_{r+1}) / S_r``.  iterations: power iterations, 0 for a full SVD.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    error: float
    gap: float
    iterations: int


def seed_of(*parts: object) -> int:
    """A seed from (seed, purpose, name): the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def truncated_svd(G: torch.Tensor, r: int, seed: int, tolerance: float) -> TruncatedSVD:
    """Top singular triplets of G (m, n), signs fixed, by randomised subspace iteration until certified.

    A matrix hardly larger than the sketch is decomposed in full.  Iterations double until the certificate is below
    ``tolerance`` or below what fp32 can show; what it ends at is in the result, rounding included.  It is a wide bound:
    at 2048 x 2048, r = 64, spectrum i^-0.7 it says 2e-3 where the angle is 6e-6.  Needs r <= min(m, n).

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    G = G.float()
    smallest = min(G.shape)
    q = min(max(4 * r, MIN_SKETCH), smallest)
    if smallest <= 2 * q:
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        return _certified(G, U, S, Vh, r, iterations=0)
    best = None
    iterations = FIRST_ITERATIONS
    while True:
        with torch.random.fork_rng(devices=[G.device] if G.is_cuda else []):
            torch.manual_seed(seed)  # svd_lowrank takes no generator
            U, S, V = torch.svd_lowrank(G, q=q, niter=iterations)
        result = _certified(G, U, S, V.T, r, iterations)
        best = result if best is None or result.error < best.error else best
        floor = RESIDUAL_FLOOR * float(S[0] / S[r - 1]) / max(result.gap, SMALL_GAP)
        if best.error <= max(tolerance, floor) or 2 * iterations > MAX_ITERATIONS:
            return best
        iterations *= 2


def _certified(
    G: torch.Tensor, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, r: int, iterations: int
) -> TruncatedSVD:
    following = S[r] if r < S.numel() else torch.zeros_like(S[0])
    right = torch.linalg.vector_norm(G @ Vh[:r].T - U[:, :r] * S[:r], dim=0).max()
    left = torch.linalg.vector_norm(G.T @ U[:, :r] - Vh[:r].T * S[:r], dim=0).max()
    gap = (S[r - 1] - following) / S[r - 1].clamp_min(torch.finfo(S.dtype).tiny)
    error = torch.maximum(left, right) / (S[r - 1] * gap.clamp_min(SMALL_GAP)).clamp_min(torch.finfo(S.dtype).tiny)
    signs = _signs(Vh)
    return TruncatedSVD(U * signs, S, Vh * signs[:, None], float(error), float(gap), iterations)


def _signs(Vh: torch.Tensor) -> torch.Tensor:
    """+-1 for each right singular vector, so that its largest entry is positive: an SVD leaves the sign open."""
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0)


def lora_one(svd: TruncatedSVD, r: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One normalised best-rank-r gradient step: ``B0 A0 = -(1/gamma) U_r (S_r / S_1) Vh_r``, base untouched.

    svd is of +G; the minus sign of SVD(-G) goes to B0.  Source: arXiv 2502.01235v3, algorithm 1.
    """
    root = (svd.S[:r] / svd.S[0]).sqrt() / math.sqrt(gamma)
    return root[:, None] * svd.Vh[:r], -svd.U[:, :r] * root


def lora_one_v1(svd: TruncatedSVD, r: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``B0 = U_r m^(1/4) / sqrt(gamma)``, ``A0 = Vh_r m^(1/4) / sqrt(gamma)``; the base becomes ``W - s B0 A0``.

    svd is of +G.  Source: arXiv 2502.01235v1.
    """
    scale = svd.U.shape[0] ** 0.25 / math.sqrt(gamma)
    return scale * svd.Vh[:r], scale * svd.U[:, :r]


def lora_ga(svd: TruncatedSVD, r: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ArB2r: A0 from singular vectors 1..r, B0 from r+1..2r, both times ``m^(1/4) / sqrt(gamma)``; base compensated.

    svd is of +G and holds 2r triplets.  These are the reference numerics; PEFT's LoRA-GA also multiplies B by S and
    leaves A unscaled.  Source: arXiv 2407.05000, section 3.
    """
    scale = svd.U.shape[0] ** 0.25 / math.sqrt(gamma)
    return scale * svd.Vh[:r], scale * svd.U[:, r : 2 * r]


def pissa(svd: TruncatedSVD, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``s B0 A0`` is the best rank-r part of W, and the base becomes the rest.  svd is of W.

    Source: arXiv 2404.02948, equations 2 and 3.
    """
    root = (svd.S[:r] / scaling).sqrt()
    return root[:, None] * svd.Vh[:r], svd.U[:, :r] * root


def kaiming(m: int, n: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain LoRA: A0 uniform in +-1/sqrt(n) (Kaiming with a = sqrt(5), as PEFT), B0 zero.  Source: arXiv 2106.09685."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(n)
    return torch.empty(r, n).uniform_(-bound, bound, generator=generator), torch.zeros(m, r)


def coverage(S: torch.Tensor, squared_norm: float, ranks: tuple[int, ...]) -> dict[int, float]:
    """Share of the matrix's energy in its k largest singular values: ``sum_{i<=k} S_i^2 / ||G||_F^2``, in [0, 1].

    Only ranks up to len(S) are given.  Source: the coverage tables of arXiv 2407.05000.
    """
    cumulative = S.double().square().cumsum(0) / squared_norm
    return {k: min(1.0, float(cumulative[k - 1])) for k in ranks if k <= S.numel()}


def subspace_overlap(first: TruncatedSVD, second: TruncatedSVD, r: int) -> float:
    """Mean squared cosine between two top-r spaces, left and right averaged: 1 equal, about r / n unrelated."""
    left = (first.U[:, :r].T @ second.U[:, :r]).square().sum()
    right = (first.Vh[:r] @ second.Vh[:r].T).square().sum()
    return float(left + right) / (2 * r)
