"""Rows of the battery that are runs of launch/train.py: the demo, two ranks on one device, and speed at an 8B shape.

Each run is a process (or two) of its own, in a folder that is removed.  On a CPU the 8B shape is a small one, so that
every row is tried; its speeds then say nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tools.bench import harness
from tools.gpu.row import Figure

ON_GPU = torch.cuda.is_available()
# hidden, intermediate, layers, heads, key/value heads, words: of Llama-3.1-8B, or small
SHAPE = (4096, 14336, 32, 32, 8, 128256) if ON_GPU else (128, 352, 4, 4, 2, 512)
LENGTH = 4096 if ON_GPU else 64
ANCHOR = 12473.0  # tokens/s of NeMo AutoModel's Llama-3 8B, LoRA r 16, one H100, 4096 tokens, micro-batch 2
WARM = 2  # steps that are not counted
LONGEST_SECONDS = 400


class RunError(RuntimeError):
    """A run of the row failed: the end of what it said."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@functools.cache
def model() -> Path:
    """A checkpoint of random bf16 weights in the SHAPE, written once."""
    folder = Path(tempfile.mkdtemp(prefix="lora_one_battery_"))
    config = harness.model_config(SHAPE)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    harness.save_tokenizer(folder, SHAPE[-1])
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights():
        names = [(name, tuple(p.shape)) for name, p in LlamaForCausalLM(config).named_parameters()]
    device, index = harness.device(), {}
    for number in range(4):
        held = {}
        for name, shape in names[number::4]:
            weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device).mul_(0.02)
            held[name] = weight.to(torch.bfloat16).cpu()
        file = f"model-{number}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def clean_up() -> None:
    """Remove the checkpoint, 16 GB."""
    if model.cache_info().currsize:
        shutil.rmtree(model(), ignore_errors=True)


def text_rows(folder: Path, count: int, tokens: int) -> Path:
    path = folder / f"{tokens}.jsonl"
    words = " ".join(f"w{3 + (7 * i) % 60}" for i in range(tokens + 8))  # cut at max_length
    path.write_text("\n".join([json.dumps({"text": words})] * count), encoding="utf-8")
    return path


def train(config: dict[str, Any], ranks: int = 1) -> list[dict[str, Any]]:
    """Run a config on this device, ``ranks`` of them sharing it.  Returns the lines of its metrics.jsonl."""
    out = Path(config["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    variables |= {"DS_ACCELERATOR": "cuda" if ON_GPU else "cpu", "HF_HUB_OFFLINE": "1"}
    if ranks > 1:
        variables |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port())}
        variables |= {"LORA_ONE_SHARED_GPU": "1"}
    command = [sys.executable, str(harness.ROOT / "launch/train.py"), "--config", str(file)]
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(0 if ON_GPU else rank)} if ranks > 1 else {}
        log = (out.parent / f"{out.name}.{rank}.log").open("w")
        started = subprocess.Popen(command, env={**variables, **own}, stdout=log, stderr=log, cwd=harness.ROOT)
        processes.append(started)
    try:
        codes = [process.wait(LONGEST_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        said = (out.parent / f"{out.name}.0.log").read_text(encoding="utf-8", errors="replace")
        raise RunError(f"exit codes {codes}: ...{' '.join(said.split())[-600:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def config_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run on the SHAPE; ``changes`` are dotted keys with __ for the dot."""
    raw: dict[str, Any] = {
        "model": {"path": str(model()), "dtype": "bf16"},
        "data": {"train": str(text_rows(folder, 64, LENGTH)), "format": "text", "max_length": LENGTH},
        "lora": {"r": 16, "alpha": 32},
        "init": {"method": "lora"},
        "optim": {"lr": 1e-5},
        "train": {"max_steps": 8, "micro_batch_size": 1, "global_batch_size": 2},
        "deepspeed": {"config": str(harness.ROOT / "ds_configs/stage0.json")},
        "checkpoint": {"steps": 0, "keep_best": False},
        "output_dir": str(folder / name),
    }
    for key, value in changes.items():
        group, _, setting = key.partition("__")
        raw[group][setting] = value
    return raw


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


def tokens_per_second(lines: list[dict[str, Any]]) -> float:
    return statistics.median(line["tokens_per_second"] for line in steps(lines)[WARM:])


def demo() -> Figure:
    """The demo on one device: it learns; and begun again it goes on to the same losses."""
    with scratch() as folder:
        raw = yaml.safe_load((harness.ROOT / "launch/configs/demo.yaml").read_text(encoding="utf-8"))
        raw["output_dir"] = str(folder / "run")
        raw["checkpoint"] = {"steps": 75, "keep_last": 3}
        raw["train"]["log_steps"] = 1
        if not ON_GPU:
            raw["train"] |= {"max_steps": 30, "eval_steps": 0, "exact_match_samples": 0}
            raw["train"].pop("exact_match_pattern"), raw["train"].pop("exact_match_max_new_tokens")
            raw["checkpoint"]["steps"] = 15
        lines = train(raw)
        middle = raw["checkpoint"]["steps"]
        again = dict(raw, output_dir=str(folder / "again"), resume=str(folder / "run/checkpoints" / f"step-{middle}"))
        resumed = train(again)
        gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps(lines)[middle:], steps(resumed), strict=True))
        summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    after, matched = summary["after"]["eval_loss"], summary["after"].get("exact_match")
    ok = gap <= 1e-4 and (after < 0.02 and matched >= 0.9 if ON_GPU else after < 2.0)
    text = f"held-out loss {after:.4f}" + (f", exact match {matched:.0%}" if matched is not None else "")
    text += f", resumed within {gap:.1e}{', the same bits' if gap == 0 else ''}"
    return Figure(ok, text, "on a GPU below 0.02 and 90 %; 1e-4", {"eval_loss": after, "resumed": gap})


def two_ranks() -> Figure:
    """Two ranks that share this device over gloo under ZeRO-3, against one that holds all: the same losses in fp32."""
    with scratch() as folder:
        small = {"model__path": str(harness.ROOT / "launch/demo/model"), "model__dtype": "fp32", "lora__r": 8}
        small |= {"data__train": str(harness.ROOT / "launch/demo/data/train.jsonl"), "data__format": "completion"}
        small |= {"data__max_length": 128, "train__max_steps": 10, "train__global_batch_size": 8}
        small |= {"init__method": "lora_one", "train__micro_batch_size": 2}
        one = steps(train(config_of(folder, "one", **small)))
        worst = 0.0
        for kind in ("non_reentrant", "none"):
            zero = {"deepspeed__config": str(harness.ROOT / "ds_configs/zero3.json")}
            zero["model__recompute"] = "none" if kind == "none" else "all"
            two = steps(train(config_of(folder, f"two-{kind}", **small, **zero), ranks=2))
            worst = max(worst, *(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)))
    return Figure(worst <= 1e-4, f"losses of 10 steps within {worst:.1e}", "1e-4", {"gap": worst})


def offload() -> Figure:
    """The base in host memory: the same losses as in the device's, and how much slower."""
    with scratch() as folder:
        kept = train(config_of(folder, "kept"))
        zero = str(harness.ROOT / "ds_configs/zero3_offload.json")
        moved = train(config_of(folder, "moved", deepspeed__config=zero))
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps(kept), steps(moved), strict=True))
    ratio = tokens_per_second(kept) / tokens_per_second(moved)
    return Figure(gap <= 2e-2, f"losses within {gap:.1e}, {ratio:.1f} times as long", "2e-2 (bf16)", {"gap": gap})


def initialise() -> Figure:
    """Load and LoRA-One initialisation of the 8B shape: seconds of each phase, certificates, the loss."""
    with scratch() as folder:
        init = {"init__method": "lora_one", "init__num_samples": 8, "data__max_length": LENGTH // 4}
        if ON_GPU:
            init |= {"init__layer_groups": 4}
        lines = train(config_of(folder, "init", train__max_steps=1, **init))
        report = json.loads((folder / "init/init_report.json").read_text(encoding="utf-8"))
        phases = json.loads((folder / "init/summary.json").read_text(encoding="utf-8"))["phases"]
    seconds = {row["phase"]: row["seconds"] for row in phases}
    worst = max(row["certified_error"] for row in report["layers"])
    falls = report["loss_after"] < report["loss_before"]
    ok = falls and (not ON_GPU or (seconds["gradient"] <= 15 and seconds["svd"] <= 60))
    named = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("load", "gradient", "svd", "broadcast"))
    peak = steps(lines)[-1]["peak_bytes"] / 2**30
    text = (
        f"{named}; largest certified error {worst:.1e}; loss {report['loss_before']:.4f} to {report['loss_after']:.4f}"
    )
    numbers = {"seconds": seconds, "certified": worst, "peak_gib": peak}
    return Figure(ok, text, "on an H100 gradient 15 s, SVDs 60 s", numbers)


def speed() -> Figure:
    """Tokens a second of the 8B shape on one device, beside NeMo AutoModel's on an H100, counted alike."""
    with scratch() as folder:
        changes = {"train__micro_batch_size": 2} if ON_GPU else {}
        lines = train(config_of(folder, "speed", **changes))
    last = steps(lines)[-1]
    found = tokens_per_second(lines)
    mfu = f", {last['mfu']:.0%} of the peak" if "mfu" in last else ""
    text = f"{found:.0f} tokens/s, {last['tflops']:.3g} TFLOP/s{mfu}, peak {last['peak_bytes'] / 2**30:.1f} GiB"
    text += f", {found / ANCHOR:.2f} times NeMo's" if ON_GPU else ""
    ok = not ON_GPU or found >= 9500
    return Figure(ok, text, "on an H100 9,500 tokens/s; NeMo AutoModel 12,473", {"tokens_per_second": found})


def recompute() -> Figure:
    """All blocks recomputed, half of them, and none: the same losses, and what each costs."""
    rates, losses = {}, {}
    with scratch() as folder:
        for count in ("all", SHAPE[2] // 2, "none"):
            lines = train(config_of(folder, f"recompute-{count}", model__recompute=count, train__max_steps=5))
            rates[str(count)] = tokens_per_second(lines)
            losses[str(count)] = [line["loss"] for line in steps(lines)]
    gap = max(abs(a - b) for one in losses.values() for a, b in zip(one, losses["all"], strict=True))
    ratio = rates["none"] / rates["all"]
    ok = gap <= 1e-3 and (not ON_GPU or ratio >= 1.2)
    text = f"none {ratio:.2f} times as fast as all; losses within {gap:.1e}"
    return Figure(ok, text, "1.2 on a GPU; 1e-3", {"tokens_per_second": rates})


def syncs() -> Figure:
    """How often the host waits for the device in a micro-batch."""
    import warnings

    from lora_one_dist.base import loading
    from lora_one_dist.base.loss import loss_sum
    from lora_one_dist.config.settings import DeepSpeedConfig, LoraConfig, ModelConfig
    from lora_one_dist.data import batches
    from tools.gpu import kernels

    kernels.start()
    settings = ModelConfig(path=str(model()), recompute="none")
    plan = loading.plan(model(), settings, LoraConfig(r=8), 0)
    deepspeed = DeepSpeedConfig(config=str(harness.ROOT / "ds_configs/stage0.json"))
    base = loading.load(settings, deepspeed, plan, 1)
    ids = torch.randint(3, 60, (512,))
    batch = batches.collate([{"input_ids": ids, "labels": ids}], 0)
    loss_sum(base.module, batch).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        loss_sum(base.module, batch).backward()
        torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    del base
    torch.cuda.empty_cache()
    return Figure(count <= 2, f"{count} in forward and backward", "at most 2", {"syncs": count})


def packing() -> Figure:
    """Documents of 300 tokens in packed rows, beside the same by themselves, padded to the longest."""
    with scratch() as folder:
        short = text_rows(folder, 600, LENGTH // 14)
        packed = {"data__train": str(short), "data__packing": True, "train__global_batch_size": 1}
        found = tokens_per_second(train(config_of(folder, "packed", **packed)))
        whole = tokens_per_second(train(config_of(folder, "whole", train__global_batch_size=1)))
        text = f"{found:.0f} tokens/s in rows of {LENGTH}, {found / whole:.2f} times those of one document"
        if not ON_GPU:
            return Figure(True, text, "a report; on a GPU also varlen", {"ratio": found / whole})
        lines = train(config_of(folder, "varlen", **packed, model__attn_implementation="varlen"))
        others = train(config_of(folder, "again", **packed))
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps(lines), steps(others), strict=True))
    gain = tokens_per_second(lines) / found
    text += f"; varlen {gain:.2f} times as fast, losses within {gap:.1e}"
    return Figure(gain >= 1.2 and gap <= 2e-2, text, "1.2; 2e-2 (bf16)", {"ratio": found / whole, "varlen": gain})


def short_samples() -> Figure:
    """Samples of 250 tokens in micro-batches of 1, 4 and 16: what the host costs."""
    rates = {}
    with scratch() as folder:
        data = text_rows(folder, 256, 250 if ON_GPU else 16)
        for size in (1, 4, 16):
            sizes = {"train__micro_batch_size": size, "train__global_batch_size": 16, "train__max_steps": 6}
            changes = {"data__train": str(data), "data__max_length": 250 if ON_GPU else 16}
            rates[size] = tokens_per_second(train(config_of(folder, f"short-{size}", **sizes, **changes)))
    text = ", ".join(f"{rate:.0f} tokens/s by {size}" for size, rate in rates.items())
    return Figure(True, text, "a report", {"tokens_per_second": rates})


def same_bits() -> Figure:
    """Twice five steps from one seed: do the bits agree?"""
    with scratch() as folder:
        short = {"train__max_steps": 5}
        losses = [[line["loss"] for line in steps(train(config_of(folder, name, **short)))] for name in ("a", "b")]
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return Figure(True, f"losses differ by {gap:.1e}", "a report: a GPU's attention adds in any order", {"gap": gap})
