"""Bytes over each host's interface per training step, 2 hosts x 2 ranks: shard_group node, world, and HF Trainer.

The goal is a ratio in one run, so that the machine does not matter.  The bytes are the kernel's count at the host's end
of its cable, headers included, both ways.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import jobs, models
from tests.ranks import write_json_lines

R, LAYERS = 8, 3
HOSTS, RANKS_PER_HOST = 2, 2
FIRST, LAST = 2, 5  # steps between which bytes are counted: the first step also gathers what stays gathered
TIMES_FEWER = 50
# TCP, IP and Ethernet headers are 66 of 1514 bytes, acknowledgements as much again; per-step scalars some kilobytes.
OVERHEAD = 1.15


def write_model(folder: Path) -> None:
    """A Llama of 3 blocks as wide as those of 300 M parameters: what crosses grows alike with their number."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    models.tokenizer("llama").save_pretrained(folder)


def bytes_per_step(hosts, job: jobs.Job, lines: Path) -> float:
    """Mean over the hosts of what crossed each one's interface in a step between FIRST and LAST."""
    counted = []
    try:
        for step in (FIRST, LAST):
            jobs.wait_for_steps(job, lines, step)
            counted.append([hosts.bytes(i) for i in range(1, HOSTS + 1)])
        assert job.wait(120) == [0], job.output()
    finally:
        job.end()
    return sum(after - before for before, after in zip(*counted, strict=True)) / HOSTS / (LAST - FIRST)


@pytest.mark.full
def test_node_sharding_sends_50_times_fewer_bytes_than_hf_trainer(hosts, tmp_path):
    folder, data = tmp_path / "model", tmp_path / "train.jsonl"
    write_model(folder)
    write_json_lines(data, models.rows(4 * (LAST + 1)))
    measured, seconds, losses = {}, {}, {}
    for shard_group in ("node", "world"):
        out = tmp_path / shard_group
        settings = {
            "model.path": folder,
            "data.train": data,
            "data.eval": "null",
            "data.max_train_samples": "null",
            "data.max_eval_samples": "null",
            "data.max_length": 16,
            "init.method": "lora",
            "init.num_samples": 8,
            "model.recompute": "all",
            "lora.r": R,
            "train.max_steps": LAST + 1,
            "train.micro_batch_size": 1,
            "train.global_batch_size": 4,
            "deepspeed.shard_group": shard_group,
        }
        started = time.monotonic()
        overrides = [f"{key}={value}" for key, value in settings.items()]
        job = jobs.start(hosts, "pdsh", HOSTS, RANKS_PER_HOST, out, *overrides)
        measured[shard_group] = bytes_per_step(hosts, job, out / "metrics.jsonl")
        seconds[shard_group] = time.monotonic() - started
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses[shard_group] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    started = time.monotonic()
    out = tmp_path / "hf.jsonl"
    arguments = ["tools/bench/hf_trainer.py", folder, "ds_configs/zero3.json", LAST + 1, out]
    job = jobs.start_script(hosts, HOSTS, RANKS_PER_HOST, tmp_path / "hf.log", *arguments)
    measured["HF Trainer"] = bytes_per_step(hosts, job, out)
    seconds["HF Trainer"] = time.monotonic() - started
    for name, value in measured.items():
        print(f"{name:<12}{value / 2**20:10.1f} MiB per host and step   {seconds[name]:5.0f} s")
    assert losses["node"] == losses["world"], "the same base, gathered elsewhere: the same bits"
    assert measured["node"] * TIMES_FEWER <= measured["HF Trainer"]
    assert measured["node"] * TIMES_FEWER <= measured["world"]
    # What must cross: half of the fp32 gradients out and half in, and the same of the adapters (module comm).
    targets = LAYERS * (2 * (1024 + 1024) + 2 * (1024 + 512) + 3 * (1024 + 2816))
    needed = 4 * R * targets * 4 * (HOSTS - 1) / HOSTS
    assert needed <= measured["node"] <= needed * OVERHEAD
