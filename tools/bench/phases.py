"""Peak memory and bytes on the wire of every phase of a run, measured, beside what the planner says.

    python tools/bench/phases.py              three models, 1 host of 2 ranks and 2 of 2, both shard groups
    python tools/bench/phases.py --short      one model, 2 hosts of 2 ranks, shard group node, for make bench
    python tools/bench/phases.py --limits     three models, 512 tokens a sample, in a memory for half of the blocks
    python tools/bench/phases.py --replan     runs nothing: the last measured rows beside the planner as it is now

Each row is a real run (launch/train.py's road) on ranks of this machine, over gloo in fp32.  Memory is the peak of live
tensor bytes of the fullest rank, load to training; wire is what the kernel counted on the ranks' interfaces, headers
included, and for a step the mean of the last ones.  With root on Linux the hosts are separate ones: network namespaces,
whose own loopback carries what stays inside and whose cable what crosses.  Elsewhere they are names, and only the sum
of both is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from tests import hosts as virtual
from tests import jobs, ranks
from tools.bench import harness
from tools.bench.tensor_bytes import TensorBytes

MODELS = {  # parameters: hidden, intermediate, layers, heads, key/value heads, words
    "30M": (384, 1024, 12, 6, 2, 8192),
    "60M": (512, 1408, 16, 8, 4, 8192),
    "120M": (768, 2048, 14, 12, 12, 8192),
    "500M": (1024, 2816, 36, 16, 16, 32000),
    "700M": (1536, 4096, 24, 12, 12, 4096),
    "1B": (2048, 5504, 18, 16, 16, 32000),
}
JOBS = [(1, 2, "world"), (2, 2, "world"), (2, 2, "node")]  # hosts, ranks a host, group: one host's two are the same
ZERO = {"stage3_max_reuse_distance": 0}  # its default would keep all of models as small as these
STEPS, LENGTH, R = 5, 32, 8
LONG = 512  # tokens, where it is the activations that fill the memory
LONGEST_SECONDS = 1200  # of a run
CHECKED = ("load", "gradient", "svd", "broadcast", "step")
MIB = 2**20


def write_run(
    folder: Path, name: str, ranks: int, shard_group: str, zero: dict[str, int], length: int = LENGTH
) -> dict[str, Any]:
    """The config of a run in ``folder/name``, and its data and ZeRO JSON."""
    words = " ".join(f"w{3 + i % 60}" for i in range(length + 8))  # cut at max_length
    rows = "\n".join([json.dumps({"text": words})] * (ranks * STEPS))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    policy = {
        "zero_optimization": {
            **json.loads((harness.ROOT / "ds_configs/zero3.json").read_text())["zero_optimization"],
            **zero,
        }
    }
    (folder / "zero.json").write_text(json.dumps(policy), encoding="utf-8")
    return {
        "model": {"path": str(folder / name), "dtype": "fp32", "recompute": "all"},
        "data": {"train": str(folder / "train.jsonl"), "format": "text", "max_length": length},
        "lora": {"r": R, "alpha": 2 * R},
        "init": {"num_samples": 2 * ranks},
        "optim": {"lr": 1e-4},
        "train": {"max_steps": STEPS, "micro_batch_size": 1, "global_batch_size": ranks},
        "deepspeed": {"config": str(folder / "zero.json"), "shard_group": shard_group},
        "checkpoint": {"steps": 0},
        "output_dir": str(Path(tempfile.mkdtemp(dir=folder)) / "run"),
    }


def sent_bytes() -> tuple[int, int]:
    """What this host's ranks have sent so far: over its loopback, and over its other interfaces."""
    inside = between = 0
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        interface, counts = line.split(":")
        if interface.strip() == "lo":
            inside += int(counts.split()[8])
        else:
            between += int(counts.split()[8])
    return inside, between


def measure(raw: dict[str, Any], separate: bool) -> dict[str, dict[str, Any]]:
    """Runs on a rank, all together: per phase the fullest rank's peak and all hosts' sent bytes.

    Args:
        separate: have the hosts interfaces of their own?
    """
    from lora_one_dist.cluster import comm
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.run import metrics
    from lora_one_dist.run.story import run
    from lora_one_dist.train import full, optim

    counted = TensorBytes()
    counts_here = comm.is_local_first() if separate else comm.rank() == 0
    found: dict[str, dict[str, Any]] = {}
    step_ends: list[tuple[int, int]] = []

    def sent() -> tuple[int, int]:
        comm.barrier()
        here = sent_bytes()
        comm.barrier()
        return here

    class Metered(metrics.Phases):
        @contextlib.contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            before = sent()
            counted.peak = counted.live
            with super().__call__(name):
                yield
            after = sent()
            row = found.setdefault(name, {"peak": 0, "inside": 0, "between": 0})
            row["peak"] = max(row["peak"], counted.peak)
            row["inside"] += after[0] - before[0]
            row["between"] += after[1] - before[1]

    kind: Any = full.FullOptimizer if raw["train"].get("mode") == "full" else optim.LayerShardedOptimizer
    stock_phases, stock_step = metrics.Phases, kind.update

    def step(self: Any, lr: float, norm: float) -> None:
        stock_step(self, lr, norm)
        step_ends.append(sent())

    metrics.Phases, kind.update = Metered, step  # type: ignore[misc]
    try:
        with counted:
            run(parse_config(raw))
    finally:
        metrics.Phases, kind.update = stock_phases, stock_step  # type: ignore[misc]
    last = STEPS - 3  # steps that count: the first ones also record what DeepSpeed fetches
    found["step"] = {
        "peak": found.pop("train")["peak"],
        **{key: (step_ends[-1][i] - step_ends[-1 - last][i]) / last for i, key in enumerate(("inside", "between"))},
    }
    everyone = comm.all_gather_object((found, counts_here))
    return {
        name: {
            "peak": max(ranks[name]["peak"] for ranks, _ in everyone),
            **{key: sum(ranks[name][key] for ranks, counts in everyone if counts) for key in ("inside", "between")},
        }
        for name in found
    }


def predicted(raw: dict[str, Any], hosts: int, ranks_per_host: int) -> Any:
    """What the planner says of the same run."""
    from lora_one_dist.base.skeleton import build_skeleton
    from lora_one_dist.base.targets import find_targets
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.plan.prediction import predict
    from lora_one_dist.plan.shape import Cluster, shape_of

    settings = parse_config(raw)
    skeleton = build_skeleton(settings.model, Path(settings.model.path))
    threshold = settings.deepspeed.persistence_threshold
    targets = find_targets(skeleton, settings.lora) if settings.train.mode == "lora" else []
    shape = shape_of(skeleton, targets, threshold)
    limit = settings.model.memory_gb
    room = math.inf if limit == "auto" else 1e9 * limit
    return predict(shape, settings, Cluster(hosts, ranks_per_host, bytes_per_rank=room, backend="gloo"))


def compare(measured: dict[str, dict[str, Any]], prediction: Any, separate: bool) -> list[dict[str, Any]]:
    """A row per phase: measured, predicted, and their ratio."""
    rows = []
    for phase in CHECKED:
        row: dict[str, Any] = {"phase": phase, "peak MiB": measured[phase]["peak"] / MIB}
        row["planned"] = prediction.peak(phase) / MIB
        row["peak ratio"] = row["peak MiB"] / row["planned"]
        wire = prediction.wire.get(phase)
        kinds = (("inside", "between") if separate else ("all",)) if wire else ()
        for kind in ("inside", "between") if separate else ("all",):
            sent = sum(measured[phase][k] for k in ("inside", "between")) if kind == "all" else measured[phase][kind]
            plan = 0.0
            if kinds:
                plan = wire.inside + wire.between if kind == "all" else getattr(wire, kind)
            row[f"{kind} MiB"] = sent / MIB
            row[f"{kind} planned"] = plan / MIB
            row[f"{kind} ratio"] = sent / plan if plan else "-"
        rows.append(row)
    return rows


def within(raw: dict[str, Any], ranks_per_host: int) -> None:
    """Let the run recompute as few blocks as a memory asks for that lies between what all and what none take."""
    peaks = []
    for recompute in ("none", "all"):
        raw["model"]["recompute"] = recompute
        found = predicted(raw, 1, ranks_per_host)
        peaks.append(max(found.peak(phase) for phase in found.memory))
    raw["model"] |= {"recompute": "auto", "memory_gb": sum(peaks) / 2e9}


def on_separate_hosts(raw: dict[str, Any], folder: Path, hosts: int, ranks_per_host: int) -> dict[str, dict[str, Any]]:
    """The same on network namespaces."""
    out, config = folder / "separate.json", folder / "separate-config.json"
    config.write_text(json.dumps(raw), encoding="utf-8")
    out.unlink(missing_ok=True)
    with virtual.Hosts(Path(tempfile.mkdtemp(dir=folder)), hosts) as made:
        job = jobs.start_script(
            made, hosts, ranks_per_host, folder / "separate.log", Path(__file__), "--child", out, "--config", config
        )
        try:
            ended = job.wait(LONGEST_SECONDS)
        finally:
            job.end()
    if ended != [0]:
        raise SystemExit(f"the run on separate hosts failed, {ended}:\n{job.output()[-3000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def child(config: Path, out: Path) -> None:
    """One rank on a separate host."""
    from lora_one_dist.cluster import comm

    comm.init()
    found = measure(json.loads(config.read_text(encoding="utf-8")), separate=True)
    if comm.rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    comm.shutdown()


def replan(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """A row for each run that was measured last: its peaks, and the ratios to what the planner says now."""
    last: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for line in harness.RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["bench"] == "phases" and row["model"] in names:
            last.setdefault((row["model"], row["ranks"], row["shard_group"]), {})[row["phase"]] = row
    rows = []
    for (name, ranks_of, group), phases in sorted(last.items()):
        hosts, each = map(int, ranks_of.split("x"))
        if (hosts, each, group) not in JOBS:
            continue
        (folder / name).mkdir(exist_ok=True)
        harness.model_config(MODELS[name]).save_pretrained(folder / name)
        prediction = predicted(write_run(folder, name, hosts * each, group, ZERO), hosts, each)
        separate = phases["step"]["separate"]
        kinds = ("inside", "between") if separate else ("all",)
        measured = {
            phase: {"peak": row["peak MiB"] * MIB, **{k: row[f"{k} MiB"] * MIB for k in kinds}}
            for phase, row in phases.items()
        }
        if not separate:
            measured = {phase: {**row, "inside": row["all"], "between": 0} for phase, row in measured.items()}
        found = {row["phase"]: row for row in compare(measured, prediction, separate)}
        shown = {"run": f"{name}, {ranks_of}, {group}", "commit": phases["step"]["commit"].removesuffix("-dirty")}
        shown["peak MiB"] = ", ".join(f"{found[phase]['peak MiB']:.0f}" for phase in CHECKED)
        shown["over planned"] = ", ".join(f"{found[phase]['peak ratio']:.2f}" for phase in CHECKED)
        for phase in ("gradient", "broadcast", "step"):
            shown[f"{phase} wire"] = " ".join(f"{found[phase][f'{kind} ratio']:.2f}" for kind in kinds)
        rows.append(shown)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="500M,700M,1B")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--replan", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()  # the launcher adds --local_rank
    if arguments.child:
        child(arguments.config, arguments.child)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks.TIMEOUT_SECONDS = LONGEST_SECONDS
    jobs_asked, names = JOBS, arguments.models.split(",")
    if arguments.short:
        jobs_asked, names = JOBS[-1:], ["120M"]
    if arguments.limits:
        jobs_asked, names = JOBS[:1], ["30M", "60M", "120M"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.replan:
            print(markdown.table(replan(folder, names)))
            return
        for name in names:
            parameters = harness.make_model(folder / name, MODELS[name])
            for hosts, each, group in jobs_asked:
                separate = hosts > 1 and not virtual.unavailable()
                raw = write_run(folder, name, hosts * each, group, ZERO, LONG if arguments.limits else LENGTH)
                if arguments.limits:
                    within(raw, each)
                prediction = predicted(raw, hosts, each)
                if separate:
                    measured = on_separate_hosts(raw, folder, hosts, each)
                else:
                    hostnames = [f"h{i // each}" for i in range(hosts * each)]
                    measured = ranks.run_ranks(hosts * each, measure, raw, False, hosts=hostnames)[0]
                found = compare(measured, prediction, separate)
                about = {"model": name, "ranks": f"{hosts}x{each}", "shard_group": group}
                if arguments.limits:
                    about |= {"memory_gb": round(raw["model"]["memory_gb"], 4), "recomputed": prediction.recomputed}
                for row in found:
                    harness.record("phases", {**about, "parameters": parameters, "separate": separate, **row})
                print(f"\n{about}, {parameters / 1e6:.0f} M parameters", "separate hosts" if separate else "")
                print(markdown.table(found), flush=True)
                rows += found
    far = [row for row in rows for key in row if key.endswith("ratio") and row[key] != "-" and abs(row[key] - 1) > 0.1]
    print(f"\n{len(rows)} phases, {len(far)} ratios more than 10 % from 1")


if __name__ == "__main__":
    main()
