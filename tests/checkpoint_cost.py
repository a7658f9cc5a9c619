"""Size and seconds of a checkpoint, r 64 on a model of 400 M parameters: ours against HF Trainer + PEFT + ZeRO-3.

    .venv/bin/python tests/checkpoint_cost.py [FOLDER]

Two ranks on this machine, fp32, the same ZeRO JSON, one after the other; every checkpoint of a run but the first, which
meets a cold disk cache, is counted.  Both times are of all ranks together, from the end of a step to the next one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import models
from tests.ranks import write_json_lines

R, STEPS = 64, 8
ZERO = "ds_configs/zero3.json"
SAVED = re.compile(r"checkpoint step-[1-9]\d* saved: ([\d.]+) MiB in ([\d.]+) s")


def four_hundred_million(folder: Path) -> int:
    """Write a Llama shape and its tokenizer; returns the number of parameters."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    models.tokenizer("llama").save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def launch(log: Path, *command: object) -> str:
    """Run a script by deepspeed on two ranks.  Returns what it printed."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    started = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, *command]
    with log.open("w") as file:
        subprocess.run(list(map(str, started)), env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)
    return log.read_text()


def ours(folder: Path, model: Path) -> tuple[float, list[float]]:
    """MiB of a checkpoint, and the seconds of each."""
    rows = write_json_lines(folder / "train.jsonl", models.rows(40))
    config = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": str(rows)},
        "lora": {"r": R, "alpha": 16},
        "init": {"method": "lora"},
        "train": {"max_steps": STEPS, "global_batch_size": 2},
        "deepspeed": {"config": ZERO},
        "checkpoint": {"steps": 2},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    printed = launch(folder / "ours.log", "launch/train.py", "--config", folder / "config.yaml")
    found = [tuple(map(float, match.groups())) for match in SAVED.finditer(printed)]
    return found[-1][0], [seconds for _, seconds in found][1:]


def hf_trainer(folder: Path, model: Path) -> tuple[float, list[float]]:
    """MiB of a checkpoint, and the seconds of each."""
    lines = folder / "hf.jsonl"
    launch(folder / "hf.log", "tools/bench/hf_trainer.py", model, ZERO, STEPS, lines, R, 2)
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    newest = folder / f"hf.jsonl.trainer/checkpoint-{STEPS}"
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return size / 2**20, [line["checkpoint_seconds"] for line in written if "checkpoint_seconds" in line][1:]


def main(arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=arguments[0] if arguments else None) as name:
        folder = Path(name)
        parameters = four_hundred_million(folder / "model")
        print(f"{parameters / 1e6:.0f} M parameters, r {R}, fp32, 2 ranks")
        print("| | MiB | median s | all s |\n|---|---|---|---|")
        for label, measure in (("lora_one_dist", ours), ("HF Trainer + PEFT + ZeRO-3", hf_trainer)):
            size, seconds = measure(folder, folder / "model")
            print(f"| {label} | {size:.0f} | {median(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
