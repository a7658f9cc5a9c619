"""Whole runs through the same entry as users', at 1 to 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_one_dist.config import parse_config
from tests import models
from tests.ranks import run_ranks, write_json_lines


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
        "optim": {"lr": 5e-3},
        "train": {"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 11},
        "deepspeed": {"config": "ds_configs/zero3.json"},
        "output_dir": str(out),
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        raw[group][name] = value
    return raw


def train(raw: dict) -> dict:
    """Runs on a rank."""
    from lora_one_dist import train as story

    return story.run(parse_config(raw))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_whole_run(model_folder, tmp_path):
    out = tmp_path / "run"
    raw = settings(model_folder("llama"), out, train__exact_match_samples=5)
    summary = run_ranks(2, train, raw, init=False)[0]
    lines = metrics(out)
    print(lines[0], lines[-1], summary)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
