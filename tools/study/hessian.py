"""The largest Hessian eigenvalue of the loss at the start of each method, and the learning rate that it predicts.

    python tools/study/hessian.py --out runs/study

The protocol of arXiv 2602.04998 (Lanczos on the adapters' parameters at their start, on training rows, fp32), with
LoRA-One added.  In: the study's base and tasks, and its study.json for the rates that won; starts are made by
launch/train.py with train.max_steps 0.  Out: ``--results``/hessian.json and hessian.md.  Curvature of the adapters of
all layers at once; a method's predicted rate is plain LoRA's best times the ratio of their largest eigenvalues.

``largest_eigenvalue`` is pure: any function that multiplies by a symmetric matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a plain checkout too

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one_dist.adapters import peft_format
from lora_one_dist.commands import markdown, sweep
from lora_one_dist.config.reading import load_config
from lora_one_dist.config.settings import Config
from lora_one_dist.data.batches import IGNORE_INDEX, collate
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.split import training_data
from tools.study import base, forked, study, tasks

METHODS = ("LoRA", "rsLoRA", "PiSSA", "LoRA-GA", "LoRA-One v1", "LoRA-One")
ROWS, MAX_ITERATIONS, TOLERANCE = 32, 40, 5e-3


def largest_eigenvalue(
    multiply: Callable[[torch.Tensor], torch.Tensor], size: int, seed: int = 0
) -> tuple[float, float, int]:
    """Largest and smallest Ritz value and the iterations, by Lanczos with full reorthogonalisation.

    Ends when the largest has changed by less than TOLERANCE of itself twice in a row.
    """
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    basis = [v / v.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    largest, smallest, settled = 0.0, 0.0, 0
    for iteration in range(min(MAX_ITERATIONS, size)):
        w = multiply(basis[-1])
        alphas.append(float(w @ basis[-1]))
        for _ in range(2):
            for earlier in basis:
                w = w - (w @ earlier) * earlier
        values = torch.linalg.eigvalsh(
            torch.diag(torch.tensor(alphas, dtype=torch.float64))
            + torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
            + torch.diag(torch.tensor(betas, dtype=torch.float64), -1)
        )
        before, largest, smallest = largest, float(values[-1]), float(values[0])
        settled = settled + 1 if abs(largest - before) < TOLERANCE * abs(largest) else 0
        beta = float(w.norm())
        if settled == 2 or beta < 1e-10:
            return largest, smallest, iteration + 1
        betas.append(beta)
        basis.append(w / beta)
    return largest, smallest, len(alphas)


class _Adapted(nn.Module):
    """``W x + s (B A - B0 A0) x`` with plain operations, which can be differentiated twice."""

    def __init__(self, linear: Any, A: torch.Tensor, B: torch.Tensor, scale: float, compensated: bool):
        super().__init__()
        weight = linear.weight.detach()
        self.weight = weight - scale * B @ A if compensated else weight
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.scale * (x @ self.A.T) @ self.B.T


def adapted(folder: Path, config: Config) -> tuple[Any, list[nn.Parameter]]:
    """The base with the adapters as a run with ``train.max_steps`` 0 has left them, and their parameters."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False).eval()
    held, parameters = peft_format.open_folder(folder), []
    for layer in held.layers.values():
        A, B = layer.A.read().float(), layer.B.read().float()
        if config.changes_base:  # written beside its own negative: W is as it was
            A, B = A[: layer.r // 2], B[:, : layer.r // 2]
        parent, _, name = layer.name.rpartition(".")
        made = _Adapted(getattr(model.get_submodule(parent), name), A, B, layer.scale, config.changes_base)
        setattr(model.get_submodule(parent), name, made)
        parameters += [made.A, made.B]
    return model, parameters


def curvature(folder: Path, config: Config) -> dict[str, float]:
    """Largest and smallest eigenvalue of the Hessian of the mean loss on the first training rows."""
    model, parameters = adapted(folder, config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data = training_data(load_rows(config.data.train, "train", ROWS), tokenizer, config.data)
    batch = collate(list(data.dataset), tokenizer.pad_token_id)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([grad.flatten() for grad in grads])

    def multiply(v: torch.Tensor) -> torch.Tensor:
        products = torch.autograd.grad(flat @ v, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([product.flatten() for product in products])

    largest, smallest, iterations = largest_eigenvalue(multiply, flat.numel())
    return {"largest": largest, "smallest": smallest, "iterations": iterations, "loss": loss.item()}


def start(out: Path, task: str, method: str) -> sweep.Point:
    """The run that makes a method's start."""
    settings: Mapping[str, str] = study.METHODS[method].settings
    chosen = {**settings, "train.max_steps": "0"}
    return sweep.make_point(out / f"{task}.yaml", out / "starts" / task, chosen, [], sweep.TRAIN, {"method": method})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of base and data")
    parser.add_argument("--results", type=Path, default=study.ROOT / "results" / "defaults")
    args = parser.parse_args()
    budget = study.BUDGETS["floor"]
    base.make(args.out / "packages", args.out / f"base-{base.DEFAULT}", budget.base_steps)
    study.prepare(args.out, budget)
    found = []
    for task in tasks.TASKS:
        points = {method: start(args.out, task, method) for method in METHODS}
        if failed := sweep.run(list(points.values()), 2, start=forked.start):
            raise SystemExit(f"starts failed: {failed}")
        for method, point in points.items():
            config = load_config(point.folder / "config.yaml", [])
            row = {"task": task, "method": method, **curvature(point.folder / "adapter_init", config)}
            found.append(row)
            print(json.dumps(row), flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "hessian.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    best = best_rates(study.ROOT / "results" / "study" / "study.json")
    (args.results / "hessian.md").write_text(markdown.table(predictions(found, best)) + "\n", encoding="utf-8")


def best_rates(path: Path) -> dict[tuple[str, str], float]:
    """By task and method, of a study's report; empty where there is none."""
    if not path.is_file():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return {(task, row["method"]): row["lr"] for task, found in held.items() for row in found.get("final", [])}


def predictions(found: list[dict[str, Any]], best: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """A row for each task and method: eigenvalues, the rate that they predict, the rate that won.  Pure."""
    plain = {row["task"]: row["largest"] for row in found if row["method"] == "LoRA"}
    rows = []
    for row in found:
        task, method = row["task"], row["method"]
        known = best.get((task, "LoRA"))
        predicted = "" if known is None else f"{known * plain[task] / row['largest']:.1e}"
        sizes = {"largest eigenvalue": f"{row['largest']:.3g}", "least": f"{row['smallest']:.3g}"}
        rows.append(
            {"task": task, "method": method, **sizes, "predicted rate": predicted, "best": best.get((task, method))}
        )
    return rows


if __name__ == "__main__":
    main()
