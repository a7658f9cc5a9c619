"""Seconds and accuracy of the truncated SVD, against what LoRA-One's and LoRA-GA's authors and PEFT do.

    python tools/bench/svd.py                                      7B shapes, r 8 to 128
    python tools/bench/svd.py --shapes 8192x8192,28672x8192        70B shapes
    python tools/bench/svd.py --short                              one small shape, for make bench

Matrices have known singular vectors and the spectrum of real gradients: those of the demo model's layers on its own
training data, continued beyond their width by the slope of their tail.  The authors' recipe is
``svd_lowrank(q=512, niter=16)``, PEFT's ``svd_lowrank(q=4r, niter=4)``.  The angle is the largest principal one between
the r-dimensional space found and the exact one, left and right, as a sine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from lora_one_dist.initialise import spectral
from tools.bench import harness

SHAPES_7B = "4096x4096,11008x4096,4096x11008"
DEMO = harness.ROOT / "launch" / "demo"
SAMPLES, LENGTH = 32, 128
TOLERANCE = 1e-3  # init.svd_tolerance's default


def demo_spectrum() -> torch.Tensor:
    """Singular values of a gradient, the mean over the demo model's layers in the logarithm, the largest 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    lines = (DEMO / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:SAMPLES]
    for line in lines:
        ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=LENGTH)["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("_proj.weight") and p.grad is not None]
    width = min(min(G.shape) for G in gradients) // 2  # of the small model's, the last values are those of its width
    logs = [torch.linalg.svdvals(G)[:width].log() for G in gradients]
    mean = torch.stack([log - log[0] for log in logs]).mean(0)
    return mean.exp()


def continued(spectrum: torch.Tensor, length: int) -> torch.Tensor:
    """A spectrum continued as a power of the index, with the slope of its second half."""
    k = spectrum.numel()
    index = torch.arange(1, k + 1, dtype=torch.float64)
    x, y = index[k // 2 :].log(), spectrum[k // 2 :].double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    tail = torch.arange(k + 1, length + 1, dtype=torch.float64)
    return torch.cat([spectrum.double(), spectrum[-1].double() * (tail / k) ** slope])[:length]


def matrix(m: int, n: int, spectrum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``G = U diag(S) V'`` in fp32 with random U (m, k) and V (n, k), k = min(m, n), and U and V."""
    generator = torch.Generator(harness.device()).manual_seed(0)
    k = min(m, n)

    def orthonormal(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, k, generator=generator, device=harness.device())).Q

    U, V = orthonormal(m), orthonormal(n)
    return (U * continued(spectrum, k).float().to(U.device)) @ V.T, U, V


def sine(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Of the largest principal angle between the spans of two orthonormal bases, both (rows, r)."""
    exact, found = exact.double(), found.double()
    return float(torch.linalg.matrix_norm(found - exact @ (exact.T @ found), 2))


def lowrank(G: torch.Tensor, r: int, q: int, niter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The r left and right singular vectors by torch's randomised SVD."""
    torch.manual_seed(0)
    U, _, V = torch.svd_lowrank(G, q=min(q, *G.shape), niter=niter)
    return U[:, :r], V[:, :r]


def ours(G: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    svd = spectral.truncated_svd(G, r, seed=0, tolerance=TOLERANCE)
    return svd.U, svd.Vh.T


def measure(m: int, n: int, r: int, repeats: int, known: tuple[torch.Tensor, ...]) -> dict[str, object]:
    G, U, V = known
    kinds: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
        "ours": lambda: ours(G, r),
        "authors": lambda: lowrank(G, r, 512, 16),
        "peft": lambda: lowrank(G, r, 4 * r, 4),
    }
    angles: dict[str, float] = {}

    def run(name: str) -> float:
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        seconds = harness.timed(lambda: found.append(kinds[name]()))
        angles[name] = max(sine(U[:, :r], found[0][0]), sine(V[:, :r], found[0][1]))
        return seconds

    seconds = harness.alternate({name: partial(run, name) for name in kinds}, repeats)
    row = {"m": m, "n": n, "r": r, "seconds": {k: harness.summary(v) for k, v in seconds.items()}, "sine": angles}
    ratios = {name: harness.paired_ratio(seconds[name], seconds["ours"]) for name in ("authors", "peft")}
    harness.record("svd", {**row, "times_faster": ratios})
    return {
        "shape": f"{m} x {n}",
        "r": r,
        **{f"{name} s": row["seconds"][name]["median"] for name in kinds},  # type: ignore[index]
        **{f"{name} sine": angles[name] for name in kinds},
        **{f"x {name}": value for name, value in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES_7B, help="MxN, separated by commas")
    parser.add_argument("--ranks", default="8,16,64,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.shapes, arguments.ranks, arguments.rounds = "2048x2048", "8,64", 2
    spectrum = demo_spectrum()
    slope = math.log(float(spectrum[-1])) / math.log(spectrum.numel())
    print(f"spectrum: {spectrum.numel()} values, the last {float(spectrum[-1]):.2g} of the first, about i^{slope:.2f}")
    rows = []
    for shape in arguments.shapes.split(","):
        m, n = map(int, shape.split("x"))
        known = matrix(m, n, spectrum)
        rows += [measure(m, n, int(r), arguments.rounds, known) for r in arguments.ranks.split(",")]
    print(markdown.table(rows))


if __name__ == "__main__":
    main()
