"""Samples of which half are prompt, at 32,000 words: a step's time and memory here and in another checkout of ours.

    git worktree add /tmp/before 5c927ad
    python tools/bench/prompts.py --before /tmp/before

A Llama shape of 134 M parameters, 512 tokens a sample, ZeRO-3 over 2 ranks, adapters on all linear layers; each
checkout's own launch/train.py, alternately: with its default settings, and here also with all blocks recomputed, as
checkouts from before ``model.recompute`` do.  Steps and memory as in tools/bench/step.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from tools.bench import harness, step

MODEL = (768, 2048, 12, 12, 12, 32000)
RANKS, LENGTH = 2, 512


def measure(
    folder: Path, checkout: Path, model: dict[str, Any], steps: int, peaks: list[int], losses: list[float]
) -> float:
    """Seconds of a step of a checkout's run."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        prompt, completion = (" ".join(f"w{3 + i % 60}" for i in range(LENGTH // 2 + extra)) for extra in (0, 8))
        rows = [json.dumps({"prompt": prompt, "completion": completion})] * (RANKS * steps)
        (scratch / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
        config = {
            "model": {"path": str(folder / "model"), "dtype": "fp32", **model},
            "data": {"train": str(scratch / "train.jsonl"), "max_length": LENGTH},
            "lora": {"r": step.R, "alpha": step.ALPHA},
            "init": {"method": "lora"},
            "optim": {"lr": 1e-4},
            "train": {"max_steps": steps, "micro_batch_size": 1, "global_batch_size": RANKS},
            "deepspeed": {"config": "ds_configs/zero3.json"},
            "checkpoint": {"steps": 0},
            "output_dir": str(scratch / "run"),
        }
        (scratch / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        step.launch(
            folder / "run.log", RANKS, "launch/train.py", "--config", scratch / "config.yaml", checkout=checkout
        )
        lines = (scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row][-1])
        return step.read_steps(scratch / "run" / "metrics.jsonl", peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ways: dict[str, tuple[Path, dict[str, Any]]] = {
        "before": (arguments.before.resolve(), {}),
        "all recomputed": (harness.ROOT, {"recompute": "all"}),
        "default": (harness.ROOT, {}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = harness.make_model(folder / "model", MODEL)
        peaks: dict[str, list[int]] = {name: [] for name in ways}
        losses: dict[str, list[float]] = {name: [] for name in ways}
        work = {
            name: partial(measure, folder, *way, arguments.steps, peaks[name], losses[name])
            for name, way in ways.items()
        }
        seconds = harness.alternate(work, arguments.rounds)
    rows = []
    for name, values in seconds.items():
        ratio = harness.paired_ratio(seconds["before"], values)
        peak, middle = max(peaks[name]), harness.summary(values)
        row = {"way": name, "times_faster": ratio, "loss": losses[name][-1]}
        harness.record("prompts", {**row, "parameters": parameters, "seconds": middle, "peak_bytes": peak})
        rows.append({**row, "step s": middle["median"], "peak MiB": peak / 2**20})
    print(markdown.table(rows))


if __name__ == "__main__":
    main()
