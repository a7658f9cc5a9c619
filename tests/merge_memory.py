"""Peak anonymous memory and seconds of a merge, ours and PEFT's, on a model of several gigabytes.  A command.

    python -m tests.merge_memory --folder /tmp/merge --hidden 2048 --layers 32

Makes a Llama of random bf16 weights in shards and an adapter on all linear layers (kept for the next time), merges it
with tools/merge_adapter.py's functions and with PEFT's merge_and_unload, each in a process of its own, and prints a
table. Anonymous memory (RssAnon) is sampled every 5 ms and counted from what it was after the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tools.bench.tensor_bytes import host_bytes

MEGABYTE = 1e6
SAMPLE_SECONDS = 0.005


class Peak:
    """The largest anonymous memory of this process while the block runs, above what it was at its start, in bytes."""

    def __enter__(self) -> Peak:
        self.start = self.highest = host_bytes("RssAnon")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(SAMPLE_SECONDS):
            self.highest = max(self.highest, host_bytes("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.bytes = self.highest - self.start


def make(folder: Path, hidden: int, layers: int, shard_bytes: int) -> None:
    """A base of random weights and an adapter, without the whole model in memory."""
    import torch
    from transformers import LlamaConfig

    from lora_one_dist.adapters import peft_format
    from lora_one_dist.convert import files
    from lora_one_dist.disk.lazy import LazyTensor

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    key_value, inner = hidden // 4, config.intermediate_size
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (32000, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"model.layers.{i}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        return LazyTensor(dtype, shape, lambda: torch.empty(shape, dtype=dtype).normal_(0, 0.02))

    torch.manual_seed(0)
    with files.new_folder(folder / "base", 0) as partial:
        config.save_pretrained(partial)
        files.write_model(partial, files.shard({n: random(s, torch.bfloat16) for n, s in shapes.items()}, shard_bytes))
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 64, "lora_alpha": 64, "target_modules": [*linear]}
    described["target_modules"] = [name.rpartition(".")[2] for name in linear]
    pairs = {}
    for i in range(layers):
        for name, (m, n) in linear.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            pairs[f"{prefix}.lora_A.weight"] = random((64, n), torch.bfloat16)
            pairs[f"{prefix}.lora_B.weight"] = random((m, 64), torch.bfloat16)
    with files.new_folder(folder / "adapter", 0) as partial:
        peft_format.write(partial, described, pairs)


def ours(folder: Path, workers: int) -> dict[str, Any]:
    from lora_one_dist.convert import files, merge

    shards = files.model_shards(folder / "base")
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    with Peak() as peak:
        merge.run(merge.plan(folder / "base", folder / "adapter"), out, workers)
    return {
        "bytes": peak.bytes,
        "seconds": time.monotonic() - started,
        "model": files.num_bytes(shards),
        "shards": len(shards),
        "largest shard": max(files.num_bytes({name: tensors}) for name, tensors in shards.items()),
        "largest delta": max(4 * t.num_bytes // 2 for s in shards.values() for n, t in s.items() if "_proj" in n),
    }


def peft(folder: Path) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = folder / "merged_by_peft"
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    with Peak() as peak:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(out)
    return {"bytes": peak.bytes, "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard_bytes", type=int, default=10**9)
    parser.add_argument("--one", choices=["ours", "ours2", "peft"], help="used by itself: one merge, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        importlib.import_module("peft")  # with transformers: what both import counts as imports
        workers = {"ours": 1, "ours2": 2}.get(arguments.one)
        measured = ours(arguments.folder, workers) if workers else peft(arguments.folder)
        print(json.dumps(measured))
        return
    if not (arguments.folder / "adapter").exists():
        shutil.rmtree(arguments.folder, ignore_errors=True)
        make(arguments.folder, arguments.hidden, arguments.layers, arguments.shard_bytes)
    rows = {}
    for one in ("ours", "ours2", "peft"):
        command = [sys.executable, "-m", "tests.merge_memory", "--folder", str(arguments.folder), "--one", one]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[one] = json.loads(done.stdout.splitlines()[-1])
    first = rows["ours"]
    allowed = first["largest shard"] + first["largest delta"] + 300 * MEGABYTE
    print(f"model {first['model'] / 1e9:.2f} GB in {first['shards']} shards")
    print(f"largest shard {first['largest shard'] / 1e6:.0f} MB")
    print(f"largest delta {first['largest delta'] / 1e6:.0f} MB; shard + delta + 300 MB = {allowed / 1e6:.0f} MB")
    for name, title in (("ours", "ours, 1 worker"), ("ours2", "ours, 2 workers"), ("peft", "PEFT")):
        print(f"{title:16} peak {rows[name]['bytes'] / 1e6:6.0f} MB  {rows[name]['seconds']:6.1f} s")
    if first["bytes"] >= allowed:
        sys.exit("the peak is above shard + delta + 300 MB")


if __name__ == "__main__":
    main()
