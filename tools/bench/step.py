"""Tokens a second while training, against HF Trainer + PEFT; and what the preconditioner adds.

    python tools/bench/step.py                              2 ranks, 400 M parameters, ZeRO-3 and stage 0
    python tools/bench/step.py --ours all,7,none --peer non_reentrant,none    what ours recomputes, and HF Trainer's way
    python tools/bench/step.py --short                      a smaller model and fewer steps, for make bench

Both train adapters of the same rank on all linear layers with AdamW, fp32 on a CPU and bf16 on a GPU, the same ZeRO
JSON, micro-batch 1, every sample of the same length; each is started by deepspeed, alternately, and each of ours is set
against each of the peer's of the same round.  Seconds are those of the median step of a run, without the first ones;
memory is the peak while training, of a GPU's allocator or else of the process (resident, imports included; have the
environment set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 1048576, or glibc keeps what was freed).  With
``--count`` it is that of live tensor bytes, and the seconds are of no use.

The preconditioner is timed by itself, on the adapters of the same model and one rank's share of them, and compared with
a step of ours at the same rank r, in the first stage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from tools.bench import harness

MODELS = {  # parameters: hidden, intermediate, layers, heads, key/value heads, words
    "400M": (1536, 4096, 14, 12, 12, 4096),
    "60M": (512, 1408, 16, 8, 4, 4096),
}
COUNT = "BENCH_COUNTS_TENSORS"
R, ALPHA, WARM = 8, 16, 2  # steps that are not counted: the first ones also build and connect
JSONS = {"stage 3": "ds_configs/zero3.json", "stage 0": "ds_configs/stage0.json"}


def launch(log: Path, ranks: int, *command: object, checkout: Path = harness.ROOT) -> None:
    """Run a script of a checkout by deepspeed on this machine's ranks; a failure shows the end of its log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    port = ["--master_addr", "127.0.0.1", "--master_port", harness.free_port()]
    counted = [harness.ROOT / "tools/bench/counted.py"] if COUNT in environment else []
    started = [Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks, *port, *counted, *command]
    with log.open("w") as file:
        done = subprocess.run(list(map(str, started)), env=environment, stdout=file, stderr=file, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{log.read_text()[-3000:]}")


def read_steps(lines: Path, peaks: list[int]) -> float:
    """Seconds of the median step after the first ones; the largest memory is added to ``peaks``."""
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "step_seconds" in row][WARM:]
    peaks.append(max(row["peak_bytes"] for row in steps))
    return median(row["step_seconds"] for row in steps)


def ours(
    folder: Path, ranks: int, steps: int, length: int, zero: str, recompute: str, peaks: list[int], r: int = R
) -> float:
    """Seconds of a step of a run of ours."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        words = " ".join(f"w{3 + i % 60}" for i in range(length + 8))  # cut at max_length
        rows = "\n".join([json.dumps({"text": words})] * (ranks * steps))
        (scratch / "train.jsonl").write_text(rows, encoding="utf-8")
        config = {
            "model": {
                "path": str(folder / "model"),
                "dtype": "bf16" if torch.cuda.is_available() else "fp32",
                "recompute": int(recompute) if recompute.isdigit() else recompute,
            },
            "data": {"train": str(scratch / "train.jsonl"), "format": "text", "max_length": length},
            "lora": {"r": r, "alpha": ALPHA},
            "init": {"method": "lora"},
            "optim": {"lr": 1e-4},
            "train": {"max_steps": steps, "micro_batch_size": 1, "global_batch_size": ranks},
            "deepspeed": {"config": zero},
            "checkpoint": {"steps": 0},
            "output_dir": str(scratch / "run"),
        }
        (scratch / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        launch(folder / "ours.log", ranks, "launch/train.py", "--config", scratch / "config.yaml")
        return read_steps(scratch / "run" / "metrics.jsonl", peaks)


def hf_trainer(
    folder: Path, ranks: int, steps: int, length: int, zero: str, checkpointing: str, peaks: list[int]
) -> float:
    """Seconds of a step of HF Trainer + PEFT."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        lines = Path(name) / "hf.jsonl"
        arguments = [folder / "model", zero, steps, lines, R, 0, length, checkpointing]
        launch(folder / "hf.log", ranks, "tools/bench/hf_trainer.py", *arguments)
        return read_steps(lines, peaks)


def preconditioner_seconds(folder: Path, r: int, ranks: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of an optimizer step of one rank's share, with and without the preconditioner, alternately."""
    from lora_one_dist.base import loading
    from lora_one_dist.config.settings import LoraConfig, ModelConfig
    from lora_one_dist.train.layout import make_layout
    from lora_one_dist.train.precondition import precondition
    from lora_one_dist.train.updates import adamw_

    settings = ModelConfig(path=str(folder / "model"), dtype="fp32")
    targets = loading.plan(folder / "model", settings, LoraConfig(r=r), 0).targets
    owned = [block for block in make_layout(targets, ranks).blocks if block.owner == 0]
    generator = torch.Generator(harness.device()).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=harness.device())

    pairs = [[random(len(b.targets), *size) for _, size in (*b.shapes, *b.shapes)] for b in owned]
    moments = [[torch.zeros_like(x) for x in (A, B, A, B)] for A, B, _, _ in pairs]

    def update(turned: bool) -> None:
        for (A, B, grad_A, grad_B), state in zip(pairs, moments, strict=True):
            grads = precondition(A, B, grad_A, grad_B, 1.0, rescale=True) if turned else (grad_A, grad_B)
            for i, (parameter, grad) in enumerate(zip((A, B), grads, strict=True)):
                adamw_(parameter, grad, state[i], state[i + 2], 1, 1e-4, (0.9, 0.999), 1e-8, 0.0)

    kinds = {"with": partial(update, True), "without": partial(update, False)}
    return harness.alternate({name: partial(harness.timed, work) for name, work in kinds.items()}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="400M")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens a sample, one sample a rank and step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", default="all,none", help="model.recompute of ours")
    parser.add_argument("--peer", default="non_reentrant,none", help="checkpointing of HF Trainer")
    parser.add_argument("--stages", default="stage 3,stage 0")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--count", action="store_true", help="peaks of tensor bytes, one round")
    arguments = parser.parse_args()
    if arguments.count:
        os.environ[COUNT], arguments.rounds = "1", 1
    if arguments.short:
        arguments.model, arguments.length, arguments.steps, arguments.rounds = "60M", 128, 6, 2
    ranks, length = arguments.ranks, arguments.length
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = harness.make_model(folder / "model", MODELS[arguments.model])
        print(f"{parameters / 1e6:.0f} M parameters, {ranks} ranks, {length} tokens a rank and step, r {R}")
        rows = []
        steps_at: dict[int, float] = {}
        stages, counts, kinds = (text.split(",") for text in (arguments.stages, arguments.ours, arguments.peer))
        for stage in stages:
            common = (folder, ranks, arguments.steps, length, JSONS[stage])
            peaks: dict[str, list[int]] = {name: [] for name in (*(f"ours {c}" for c in counts), *kinds)}
            work = {f"ours {count}": partial(ours, *common, count, peaks[f"ours {count}"]) for count in counts}
            work |= {kind: partial(hf_trainer, *common, kind, peaks[kind]) for kind in kinds}
            seconds = harness.alternate(work, arguments.rounds)
            measured = {name: harness.summary(values) for name, values in seconds.items()}
            for count, kind in product(counts, kinds):
                names = {"ours": f"ours {count}", "HF Trainer": kind}
                ratio = harness.paired_ratio(seconds[kind], seconds[f"ours {count}"])
                row = {"stage": stage, "ours recomputes": count, "HF": kind}
                details = {"parameters": parameters, "ranks": ranks, "length": length, "times_faster": ratio}
                details["seconds"] = {who: measured[name] for who, name in names.items()}
                details["peak_bytes"] = {who: peaks[name] for who, name in names.items()}
                harness.record("step, tensor bytes" if arguments.count else "step", {**row, **details})
                speeds = {f"{who} tokens/s": ranks * length / measured[name]["median"] for who, name in names.items()}
                sizes = {f"{who} peak MiB": max(peaks[name]) / 2**20 for who, name in names.items()}
                rows.append({**row, **speeds, "ratio": ratio, **sizes})
                steps_at.setdefault(R, measured[f"ours {count}"]["median"])
        print(markdown.table(rows))
        if arguments.count:
            return
        shares = []
        torch.set_num_threads(1)  # as a rank has
        for r in (R, 2 * R, 8 * R):
            if r not in steps_at:
                steps_at[r] = ours(folder, ranks, arguments.steps, length, JSONS[stages[0]], counts[0], [], r)
            step = steps_at[r]
            seconds = preconditioner_seconds(folder, r, ranks, 5)
            added = median(a - b for a, b in zip(seconds["with"], seconds["without"], strict=True))
            harness.record("preconditioner", {"r": r, "seconds": added, "step_seconds": step, "share": added / step})
            shares.append({"r": r, "step s": step, "preconditioner ms": added * 1e3, "share": f"{added / step:.2%}"})
        print(markdown.table(shares))


if __name__ == "__main__":
    main()
