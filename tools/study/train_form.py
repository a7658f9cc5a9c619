"""launch/train.py with a form of the preconditioner that the package does not have (:mod:`forms`).

    python tools/study/train_form.py --form around --config runs/study/gap.yaml optim.lr=1e-3 output_dir=runs/around

All but the optimizer's update is the package's.  ``optim.preconditioner`` and ``optim.damping`` of the config are not
used.  Out: the run folder, and beside it <its name>.trace.jsonl: every TRACED steps the sizes of Grams and steps.  One
that was cut off must start again: the moments of a form are not in its checkpoints.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a plain checkout too

import torch

from lora_one_dist.config.reading import load_config
from lora_one_dist.train import optim
from tools.study import forms

ROOT = Path(__file__).resolve().parents[2]
TRACED = 4


def use(form: forms.Form, trace: Path) -> None:
    """Every optimizer made from here on updates by this form, and writes what it does to ``trace``."""
    kept: dict[int, tuple[forms.Moments, forms.Moments]] = {}

    def update(self: optim.LayerShardedOptimizer, grads: torch.Tensor, lr: float) -> None:
        config, rows = self.config, []
        assert config.name == "adamw"
        for block in self._own_blocks():
            A, B = block.split(self.masters).values()
            grad_A, grad_B = block.split(grads).values()
            if block.start not in kept:
                if self.steps != 1:
                    raise RuntimeError("a form's moments are in no checkpoint: delete the run's folder and start again")
                zeros = [[torch.zeros_like(t) for _ in range(2)] for t in (grad_A, grad_B.mT.contiguous())]
                kept[block.start] = (forms.Moments(*zeros[0]), forms.Moments(*zeros[1]))
            moments = kept[block.start]
            steps = forms.steps_of_pairs(
                A, B, grad_A, grad_B, moments, self.steps, config.betas, config.eps, form, lr / config.lr
            )
            if self.steps % TRACED == 1:
                rows += facts(A, B, grad_A, steps)
            for value, step, rate in ((A, steps[0], lr), (B, steps[1], lr * config.lr_ratio_b)):
                value.mul_(1 - rate * config.weight_decay).add_(step, alpha=-rate)
        if rows:
            means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
            with trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.steps, "lr": lr, **means}) + "\n")

    optim.LayerShardedOptimizer._update = update  # type: ignore[method-assign]


def facts(
    A: torch.Tensor,
    B: torch.Tensor,
    grad_A: torch.Tensor,
    steps: tuple[torch.Tensor, torch.Tensor],
) -> list[dict[str, float]]:
    """Of each pair: mean eigenvalue of B'B, sizes of entries, where lora_A's step goes."""
    found: list[dict[str, float]] = []
    for a, b, ga, sa, sb in zip(A, B, grad_A, *steps, strict=True):
        values, vectors = torch.linalg.eigh(b.double().T @ b.double())
        quarter = max(1, len(values) // 4)
        rotated = (vectors.T @ sa.double()).square().sum(1)
        raw = (vectors.T @ ga.double()).square().sum(1)
        moved = b @ sa + sb @ a
        found.append(
            {
                "gram_B": float(values.mean()),
                "rms_step_A": float(sa.square().mean().sqrt()),
                "rms_moved": float(moved.square().mean().sqrt()),
                "weak_share": float(rotated[:quarter].sum() / rotated.sum().clamp(min=1e-30)),
                "weak_share_of_gradient": float(raw[:quarter].sum() / raw.sum().clamp(min=1e-30)),
                "below_eps": float((ga.abs() < 1e-8).double().mean()),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=list(forms.FORMS), required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    folder = Path(load_config(args.config, args.overrides).output_dir)
    trace = folder.with_name(f"{folder.name}.trace.jsonl")
    trace.unlink(missing_ok=True)
    use(forms.FORMS[args.form], trace)
    arguments = ["--config", args.config, *args.overrides]
    sys.argv = [str(ROOT / "launch" / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
