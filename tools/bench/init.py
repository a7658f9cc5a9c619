"""Seconds and memory from a base to adapters set, against PEFT's LoRA-GA.

    python tools/bench/init.py                        1 rank, a Llama shape of 372 M parameters in fp32
    python tools/bench/init.py --roads ours           one of our roads and PEFT's alone
    python tools/bench/init.py --ranks 1,2,4          ours over ranks: the busy seconds of each
    python tools/bench/init.py --short                a smaller model, for make bench

Ours: gradient, SVD, broadcast, adapters in place (init.method lora_one with its defaults): without gradient
checkpointing as PEFT's road is and as our default is where memory allows, with it, and bounded by ``layer_groups``
besides.  PEFT's: ``preprocess_loraga`` and ``get_peft_model``.  The same weights, the same batches, micro-batch 1;
without the loading.  Each measurement has processes of its own; those that are timed touch their memory before.  Memory
is the peak of live tensor bytes beyond the model's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from tools.bench import harness
from tools.bench.tensor_bytes import TensorBytes

MODELS = {  # parameters: hidden, intermediate, layers, heads, key/value heads, words
    "370M": (1024, 2816, 26, 16, 8, 32000),
    "60M": (512, 1408, 16, 8, 4, 4096),
}
SAMPLES, R, ALPHA = 8, 8, 16
ROADS: dict[str, dict[str, Any]] = {
    "ours": {"model.recompute": "none"},  # as auto, which a run decides by memory, is where it fits
    "checkpointing": {"model.recompute": "all"},
    "bounded": {"model.recompute": "all", "init.layer_groups": 2},
}


def batch_ids(length: int) -> torch.Tensor:
    return torch.randint(3, 4096, (SAMPLES, length), generator=torch.Generator().manual_seed(1))


class Ours:
    """Our road on this rank: load, then initialise."""

    def __init__(self, folder: Path, length: int, overrides: dict[str, Any], zero: str):
        from lora_one_dist.base import loading
        from lora_one_dist.config.settings import Config
        from lora_one_dist.initialise import gradient

        raw: dict[str, Any] = {
            "model": {"path": str(folder), "dtype": "fp32"},
            "data": {"train": "none.jsonl"},
            "lora": {"r": R, "alpha": ALPHA},
            "init": {"num_samples": SAMPLES},
            "train": {"max_steps": 0},
            "deepspeed": {"config": zero},
            "output_dir": "none",
        }
        for key, value in overrides.items():
            group, _, name = key.partition(".")
            raw[group][name] = value
        self.config = Config.model_validate(raw)
        plan = loading.plan(folder, self.config.model, self.config.lora, R)
        self.base = loading.load(self.config.model, self.config.deepspeed, plan, 1)
        self.targets = plan.targets
        samples = [{"input_ids": row, "labels": row} for row in batch_ids(length).tolist()]
        parts = 2 if self.config.init.halves else 1
        self.batch = gradient.deal_micro_batches(samples, 1, self.config.init.average, parts, 0)
        self.phases: dict[str, float] = {}
        self.busy: dict[str, float] = {}

    def held(self) -> list[torch.Tensor]:
        """Tensors of the model."""
        parameters: list[Any] = list(self.base.module.parameters())
        shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        return [*shards, *[p.data for p in parameters], *self.base.module.buffers()]

    def initialise(self) -> None:
        from lora_one_dist.adapters.lora import inject_adapters, peft_config, set_adapters
        from lora_one_dist.initialise import pairs

        result = pairs.initial_pairs(self.base, self.targets, self.config, self.batch, phase=self._phase)
        with self._phase("set adapters"):
            description = peft_config(self.config.lora, self.targets, self.config.model.path)
            adapters = inject_adapters(self.base, description, self.targets, self.config.model.dtype)
            set_adapters(self.base, adapters, result.pairs, compensate=False)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began, busy = time.perf_counter(), time.process_time()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - began
        self.busy[name] = self.busy.get(name, 0.0) + time.process_time() - busy


class Peft:
    """PEFT's road, with its default settings."""

    def __init__(self, folder: Path, length: int):
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = loaded.to(harness.device())
        self.ids = batch_ids(length).to(harness.device())

    def held(self) -> list[torch.Tensor]:
        return [*[p.data for p in self.model.parameters()], *self.model.buffers()]

    def initialise(self) -> None:
        from peft import LoraConfig, LoraGAConfig, get_peft_model
        from peft.tuners.lora.loraga import preprocess_loraga

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        start: Any = "lora_ga"
        config = LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=start, lora_ga_config=LoraGAConfig()
        )

        def train_step() -> None:
            for row in self.ids:
                self.model(input_ids=row[None], labels=row[None]).loss.backward()

        preprocess_loraga(self.model, config, train_step)
        get_peft_model(self.model, config)


def peak_bytes(road: Ours | Peft) -> int:
    """Of tensors beyond the model's, while a road initialises."""
    with TensorBytes(road.held()) as counted:
        before = counted.live
        road.initialise()
    return counted.peak - before


def touch_memory(folder: Path) -> None:
    """Take and give back what a rank may need: a virtual machine is slow where a page is touched for the first time.

    Without it, of two equal roads that comes out ahead which an earlier process has left more pages.
    """
    from lora_one_dist.cluster import comm

    if harness.device().type == "cpu":
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        torch.empty(4 * weights // comm.world_size(), dtype=torch.uint8).fill_(1)


def child(folder: Path, length: int, road: str, zero: str, count: bool, out: Path) -> None:
    """One rank of one road: its seconds, busy and by the clock, or (``count``) its peak of tensor bytes."""
    from lora_one_dist.cluster import comm

    comm.init()
    if not count:
        touch_memory(folder)
    made = Peft(folder, length) if road == "PEFT" else Ours(folder, length, ROADS[road], zero)
    found: dict[str, Any] = {}
    if count:
        found["peak_bytes"] = peak_bytes(made)
    else:
        found["seconds"] = harness.timed(made.initialise)
    if isinstance(made, Ours):
        found |= {"phases": made.phases, "busy": made.busy}
    everyone = comm.all_gather_object(found)
    if comm.rank() == 0:
        out.write_text(json.dumps(everyone), encoding="utf-8")
    comm.shutdown()


def run_road(
    folder: Path, length: int, zero: str, road: str, ranks: int | None = None, count: bool = False
) -> list[dict[str, Any]]:
    """What each rank of a road has found: so many ranks of one thread, or one rank with all threads."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "ranks.json"
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"] if ranks else []
        arguments = ["--child", str(out), "--road", road, "--folder", str(folder), "--length", str(length)]
        arguments += ["--zero", zero, *(["--count"] if count else [])]
        threads = {"OMP_NUM_THREADS": "1"} if ranks else {}
        done = subprocess.run(
            [sys.executable, *launcher, __file__, *arguments],
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{road} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def one_rank(folder: Path, length: int, rounds: int, zero: str, ours: list[str]) -> list[dict[str, Any]]:
    """Time and memory of these roads of ours and of PEFT's."""
    roads = [*ours, "PEFT"]
    phases: dict[str, dict[str, float]] = {}

    def seconds_of(road: str) -> float:
        (found,) = run_road(folder, length, zero, road)
        phases[road] = found.get("phases", {})
        return float(found["seconds"])

    seconds = harness.alternate({road: partial(seconds_of, road) for road in roads}, rounds)
    peaks = {road: run_road(folder, length, zero, road, count=True)[0]["peak_bytes"] for road in roads}
    rows = []
    for road in roads:
        ratio = harness.paired_ratio(seconds["PEFT"], seconds[road])
        measured = harness.summary(seconds[road])
        row = {"road": road, "seconds": measured, "peak_bytes": peaks[road], "length": length}
        harness.record("init", {**row, "phases": phases[road], "times_faster_than_peft": ratio})
        rows.append(
            {
                "road": road,
                "s": measured["median"],
                "x PEFT": ratio,
                "peak MiB": peaks[road] / 2**20,
                "of PEFT's": peaks[road] / peaks["PEFT"],
                **{phase: phases[road].get(phase) for phase in ("gradient", "svd", "set adapters")},
            }
        )
    return rows


def scaling(folder: Path, length: int, zero: str, ranks: list[int]) -> list[dict[str, Any]]:
    """Busy seconds of the SVD phase over numbers of ranks of one thread each."""
    rows = []
    for world_size in ranks:
        found = run_road(folder, length, zero, "ours", world_size)
        busy = {phase: [rank["busy"][phase] for rank in found] for phase in ("gradient", "svd")}
        harness.record("init over ranks", {"ranks": world_size, "length": length, "busy_seconds": busy})
        rows.append({"ranks": world_size, **{f"{p} busy s, most": max(s) for p, s in busy.items()}})
    for row in rows:
        row["svd, times rank 1's"] = rows[0]["svd busy s, most"] / row["svd busy s, most"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="370M")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--roads", default=",".join(ROADS), help="ours, checkpointing, bounded")
    parser.add_argument("--ranks", default="", help="ours over these numbers of ranks instead, e.g. 1,2,4")
    parser.add_argument("--zero", default="ds_configs/zero3.json")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--road", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.folder, arguments.length, arguments.road, arguments.zero, arguments.count, arguments.child)
        return
    if arguments.short:
        arguments.model, arguments.rounds, arguments.length = "60M", 2, 128
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        parameters = harness.make_model(folder, MODELS[arguments.model])
        print(f"{parameters / 1e6:.0f} M parameters, {SAMPLES} samples of {arguments.length} tokens, r {R}, fp32")
        if arguments.ranks:
            ranks = [int(n) for n in arguments.ranks.split(",")]
            print(markdown.table(scaling(folder, arguments.length, arguments.zero, ranks)))
            return
        roads = arguments.roads.split(",")
        print(markdown.table(one_rank(folder, arguments.length, arguments.rounds, arguments.zero, roads)))


if __name__ == "__main__":
    main()
