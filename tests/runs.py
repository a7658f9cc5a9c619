"""Whole runs on ranks: their settings, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one_dist.config.reading import parse_config
from tests import models, reference
from tests.ranks import write_json_lines


def settings(folder: Path, out: Path, **changes) -> dict:
    """A small fp32 run as a mapping; ``changes`` are dotted keys with __ for the dot."""
    data = out.parent / "data"
    if not data.exists():
        data.mkdir(parents=True)
        write_json_lines(data / "train.jsonl", models.rows(100))
        write_json_lines(data / "eval.jsonl", models.rows(21, seed=1))
    raw = {
        "model": {"path": str(folder), "dtype": "fp32"},
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl"), "max_length": 32},
        "lora": {"r": 4, "alpha": 8},
        "init": {},
        "optim": {"lr": 5e-3, "preconditioner": "rescaled"},
        "train": {"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 11},
        "deepspeed": {"config": "ds_configs/zero3.json"},
        "output_dir": str(out),
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        raw[group][name] = value
    return raw


# Layers of other ranks and scales, one that is too narrow for its rank, and one without an adapter.
PATTERNS = {
    "lora__rank_pattern": {"v_proj": 2, "(k|gate)_proj": 20},
    "lora__alpha_pattern": {r"1\..*_proj": 5},
    "lora__exclude_modules": ["0.mlp.up_proj"],
}


def train(raw: dict) -> dict:
    """Runs on a rank."""
    from lora_one_dist.run import story

    return story.run(parse_config(raw))


def train_each(raws: list[dict]) -> list[dict]:
    """Runs on a rank: one run after another."""
    return [train(raw) for raw in raws]


def refused(raw: dict) -> str:
    """Runs on a rank: the error of a run that must not start, and that no weight was read."""
    from lora_one_dist.base import loading
    from lora_one_dist.run import story

    def never(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    loading.load = never
    try:
        story.run(parse_config(raw))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "not refused"


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def peft_eval_loss(base: Path, adapter: Path, rows: list[dict[str, str]], dtype: torch.dtype) -> float:
    """The eval loss of a plain PEFT model on the untouched base, one unpadded sample at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapter).eval()
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        sample = {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}
        with torch.no_grad():
            losses.append(reference.token_losses(model, sample))
    return float(torch.cat(losses).double().mean())
