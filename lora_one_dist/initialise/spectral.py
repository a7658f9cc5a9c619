"""Truncated SVD and every spectral initialisation: pure functions of one matrix.

In: a gradient G or a weight W (m, n), fp32, on one rank.  Out: ``A0 (r, n)``, ``B0 (m, r)``, fp32, for the forward
``W x + s B0 A0 x``.  Nothing here knows of ranks or files.  Peak bytes: the matrix, plus ``4 q (3 m + 3 n)``
for a Krylov space of q columns (5r to 10r), or ``4 (m + n) min(m, n)`` for a full SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_BLOCK = 16  # columns of a block of the Krylov space; 3/4 r where that is more (krylov_width)
FULL_BLOCKS = 8  # a matrix hardly larger than so many blocks is decomposed in full
MAX_BLOCKS = 32
# Singular triplets in fp32 leave a residual of about this times S_1 however long one iterates (measured: 6 to 9 eps).
RESIDUAL_FLOOR = 10 * torch.finfo(torch.float32).eps
NORM_CHUNK = {"cpu": 2**18, "cuda": 2**26}  # elements whose squares are added at once: of a cache; few kernels
SMALL_GAP = 1e-2  # (S_r - S_{r+1}) / S_r below which the top-r space is not determined by the matrix

SCHEMES: dict[str, Callable[[int], tuple[slice, slice]]] = {  # of r: the triplets whose v goes to A, and whose u to B
    "arb2r": lambda r: (slice(r), slice(r, 2 * r)),
    "a2rbr": lambda r: (slice(r, 2 * r), slice(r)),
    "arbr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}


@dataclass(frozen=True)
class TruncatedSVD:
    """``U (m, r), Vh (r, n)`` of the r largest singular values, with a certificate, and those values first in S.

    S (k,): as many as the Krylov space shows well, k > r; those beyond r are too small by some per cent.
    error: ``max_{i<=r} ||G v_i - S_i u_i|| / (S_r - S_{r+1})``, which bounds the sine of the angle to the exact top-r
    space up to a small factor (Wedin; of the other side there is no residual).  Where the gap is below SMALL_GAP of S_r
    the space is not determined and SMALL_GAP * S_r takes the gap's place.  gap: ``(S_r - S_{r+1}) / S_r``.  blocks: of
    the Krylov space, 0 for a full SVD.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    error: float
    gap: float
    blocks: int


def krylov_width(r: int) -> int:
    """Columns of a block of the Krylov space for r triplets."""
    return max(MIN_BLOCK, 3 * r // 4)


def truncated_svd(G: torch.Tensor, r: int, seed: int, tolerance: float) -> TruncatedSVD:
    """Top singular triplets of G (m, n), signs fixed, by randomised block Krylov iteration until certified.

    The space grows by a block of G'G at a time, from 4r columns on, until the certificate is below ``tolerance`` or
    below what fp32 can show.  Where it would not stay small, the SVD is a full one.  Needs r <= min(m, n).

    Source: Musco and Musco, arXiv 1504.05477, algorithm 2; with the basis kept orthonormal on both sides.
    """
    G = G.float()
    smallest, width = min(G.shape), krylov_width(r)
    blocks, first_certified = 0, -(-4 * r // width) + 1
    best: TruncatedSVD | None = None
    generator = torch.Generator(G.device).manual_seed(seed)
    right = torch.linalg.qr(torch.randn(G.shape[1], width, generator=generator, device=G.device)).Q
    left, image = G.new_empty(G.shape[0], 0), G.new_empty(G.shape[1], 0)
    product = G @ right
    while smallest > FULL_BLOCKS * width and (blocks + 2) * width <= smallest and blocks < MAX_BLOCKS:
        blocks += 1
        left = torch.cat([left, _orthonormal(product[:, -width:], left)], 1)
        image = torch.cat([image, G.T @ left[:, -width:]], 1)  # G' left, which lies in the span of right
        right = torch.cat([right, _orthonormal(image[:, -width:], right)], 1)
        product = torch.cat([product, G @ right[:, -width:]], 1)  # G right: for the next block, and the certificate
        if blocks < first_certified:
            continue
        V, S, Uh = _small_svd(right.T @ image)
        shown = S[: max(r + 1, S.numel() // 2)]
        result = _certified(product @ V[:, :r], left @ Uh[:r].T, shown, (right @ V[:, :r]).T, r, blocks)
        best = result if best is None or result.error < best.error else best
        floor = RESIDUAL_FLOOR * float(S[0] / S[r - 1]) / max(result.gap, SMALL_GAP)
        if best.error <= max(tolerance, floor):
            return best
    if best is not None and blocks == MAX_BLOCKS:
        return best
    U, S, Vh = _full_svd(G)
    return _certified(G @ Vh[:r].T, U[:, :r], S, Vh[:r], r, blocks=0)


def _small_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the host: a GPU's takes longer for some hundred columns, and other bits on each kind of GPU."""
    found = torch.linalg.svd(matrix.double().cpu() if matrix.is_cuda else matrix, full_matrices=False)
    return tuple(part.to(matrix) for part in found)


def _full_svd(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``U, S, Vh`` by the SVD of the short side's triangle."""
    if G.shape[0] < G.shape[1]:
        V, S, Uh = _full_svd(G.T)
        return Uh.T, S, V.T
    Q, R = torch.linalg.qr(G)
    U, S, Vh = _small_svd(R)
    return Q @ U, S, Vh


def _orthonormal(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the block's part outside ``basis``; twice, for what rounding leaves of the inside."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _certified(
    GV: torch.Tensor, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, r: int, blocks: int
) -> TruncatedSVD:
    """With the certificate of triplets of which ``G' U = V S`` holds by construction, from ``G V`` (m, r)."""
    following = S[r] if r < S.numel() else torch.zeros_like(S[0])
    residual = torch.linalg.vector_norm(GV - U * S[:r], dim=0).max()
    gap = (S[r - 1] - following) / S[r - 1].clamp_min(torch.finfo(S.dtype).tiny)
    error = residual / (S[r - 1] * gap.clamp_min(SMALL_GAP)).clamp_min(torch.finfo(S.dtype).tiny)
    signs = _signs(Vh)
    return TruncatedSVD(U * signs, S, Vh * signs[:, None], float(error), float(gap), blocks)


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
    scale = stable_scale(svd.U.shape[0], gamma)
    return scale * svd.Vh[:r], scale * svd.U[:, :r]


def stable_scale(m: int, gamma: float) -> float:
    """``m^(1/4) / sqrt(gamma)``, of A and of B.  Source: "stable output" of arXiv 2407.05000, section 3."""
    return m**0.25 / math.sqrt(gamma)


def lora_ga(svd: TruncatedSVD, r: int, scheme: str, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 of r of the first 2r right singular vectors, B0 of the others' left ones, times ``scale``; base compensated.

    With any scheme of :data:`SCHEMES` the first step of gradient descent at a small rate moves ``s B A`` along the best
    rank-2r part of G, ``(s scale)^2`` times as far as it would move W.  svd is of +G and holds 2r triplets.  These are
    the reference numerics; PEFT's LoRA-GA also multiplies B by S.  Source: arXiv 2407.05000, section 3 and its code.
    """
    right, left = SCHEMES[scheme](r)
    return scale * svd.Vh[right], scale * svd.U[:, left]


def random_directions(m: int, n: int, r: int, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 with orthonormal rows and B0 with orthonormal columns, times ``scale``; base compensated.

    On the host.  Source: the ablation of arXiv 2407.05000 without gradient approximation.
    """
    generator = torch.Generator().manual_seed(seed)
    A0, B0 = (torch.linalg.qr(torch.randn(size, r, generator=generator)).Q for size in (n, m))
    return scale * A0.T.contiguous(), scale * B0


def lora_sb(svd: TruncatedSVD, r: int, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``s B0 A0`` is the best rank-r part of AdamW's first step of full fine-tuning, ``-lr sign(G)``; base untouched.

    svd is of sign(G); ``step`` is lr / s.  B0 has orthonormal columns, A0 orthogonal rows: the core R lies between them
    (:func:`lora_one_dist.adapters.lora.core_of`).  Source: arXiv 2411.19557, algorithm 1.
    """
    return step * svd.S[:r, None] * svd.Vh[:r], -svd.U[:, :r]


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


def gaussian(m: int, n: int, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """AdaLoRA's A0 and B0, between which E is 0: normal with deviation 0.02, as PEFT.  Source: arXiv 2303.10512."""
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(r, n, generator=generator), 0.02 * torch.randn(m, r, generator=generator)


def frobenius_norm(tensor: torch.Tensor) -> float:
    """Of any shape, summed in fp64: finite if and only if every element (fp32) is, and 0 only of zeros.

    In pieces: torch's sum in fp64 copies what it adds.
    """
    pieces = tensor.reshape(-1).split(NORM_CHUNK[tensor.device.type])
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


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
