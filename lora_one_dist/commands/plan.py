"""What will a run take?  Memory of each phase, bytes on the wire, operations and seconds, before anything is started.

    python tools/plan.py --model meta-llama/Llama-3.1-8B --hosts 4 --ranks_per_host 8 --gpu_gb 80
    python tools/plan.py --config launch/configs/mine.yaml --hosts 1 lora.r=64 train.micro_batch_size=4
    python tools/plan.py --model tools/shapes/llama-3.3-70b --hosts 4 --gpu_gb 40 data.max_length=4096
    python tools/plan.py --table        the README's table: four models on three clusters

Reads the model's config.json (a folder, that file, or a hub name) and no weights; the run's YAML, whose data need not
be there, with overrides as for launch/train.py; and its ZeRO JSON.  Prints what does not fit and which settings make it
fit.  Exit code 0: all phases fit; 2: one does not; 1: the question makes no sense.

tools/bench/phases.py holds memory, and the wire over gloo, against measurements.  What is said of NCCL, and every
second, is a prediction: give your cluster's speeds for better ones.  Of CPU ranks (--backend gloo) there are no seconds
unless --tflops is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from lora_one_dist.base import loading
from lora_one_dist.base.export import refuse_untrainable
from lora_one_dist.base.rehearsal import rehearse
from lora_one_dist.base.skeleton import ModelError, build_skeleton
from lora_one_dist.base.tables import plan_tables
from lora_one_dist.base.targets import find_targets
from lora_one_dist.base.two_stacks import refuse_settings
from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.config.reading import ConfigError, load_config, parse_config
from lora_one_dist.config.settings import Config
from lora_one_dist.initialise import pairs
from lora_one_dist.plan import shape as shapes
from lora_one_dist.plan.advice import advice, faster
from lora_one_dist.plan.prediction import predict
from lora_one_dist.plan.shape import Cluster, Shape
from lora_one_dist.plan.wire import Wire

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = "planned/elsewhere"  # data that need not be on this machine
DOES_NOT_FIT = 2
GB = 1e9
TABLE_LENGTH = 4096
RESERVE = 4.0  # GB of a GPU for CUDA, NCCL and fragments
SHAPES = ("llama-2-7b", "llama-3.1-8b", "llama-2-13b", "llama-3.3-70b")
CLUSTERS = ((1, 8), (4, 8), (8, 4))
GPUS = (40, 80, 141)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--model", type=paths.name_argument, help="folder, config.json or hub name (the config's model.path)"
    )
    parser.add_argument("--config", type=paths.argument, help="YAML of the run (defaults, bf16)")
    parser.add_argument("--hosts", type=command_line.positive, default=1)
    parser.add_argument("--ranks_per_host", type=command_line.positive, default=8)
    parser.add_argument("--gpu_gb", type=float, default=80.0, help="memory of a GPU, 10^9 bytes (80)")
    parser.add_argument("--reserve_gb", type=float, default=RESERVE, help="of it for CUDA, NCCL and fragments (4)")
    parser.add_argument("--tflops", type=float, help="speed that a rank reaches, 10^12 a second (nccl: 400, in bf16)")
    parser.add_argument("--inside_gbs", type=float, default=200.0, help="a rank's wire inside its host, GB/s (200)")
    parser.add_argument("--between_gbs", type=float, default=25.0, help="a rank's wire between hosts, GB/s (25)")
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--table", action="store_true", help="print the README's table and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args(argv)


def settings_of(config: Path | None, model_path: str | None, overrides: list[str]) -> Config:
    """The run's config; its data are taken to be on the cluster."""
    given = []
    if model_path:
        given.append(f"model.path={model_path}")
    if config is None:
        raw: dict[str, Any] = {
            "model": {"dtype": "bf16"},
            "data": {"train": ELSEWHERE},
            "train": {"max_steps": 1},
            "deepspeed": {"config": str(ROOT / "ds_configs/zero3.json")},
            "output_dir": "planned",
        }
        return parse_config(raw, given + overrides, command_line.tell)
    try:
        data = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        data = {}  # load_config says what is wrong
    given += [f"data.{key}={ELSEWHERE}" for key in ("train", "eval") if data.get(key)]
    return load_config(config, given + overrides, command_line.tell)


def folder_of(path: str) -> Path:
    """Where the model's config.json lies; of a hub name that file alone is fetched."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, "config.json")).parent


def shape_of(settings: Config) -> Shape:
    """Raises model.ModelError as the run would."""
    skeleton = build_skeleton(settings.model, folder_of(settings.model.path))
    refuse_settings(skeleton, settings)
    threshold = settings.deepspeed.persistence_threshold
    if settings.train.mode == "full":
        refuse_untrainable(skeleton, settings.model)
        return shapes.shape_of(skeleton, [], threshold)
    needed = pairs.singular_vectors_needed(settings.init, settings.lora.r)
    targets = find_targets(skeleton, settings.lora, needed, settings.changes_base)
    for note in loading.notes_on(skeleton, settings.model, rehearse(skeleton, settings.model)):
        command_line.tell(note)
    rows = skeleton.get_input_embeddings().num_embeddings
    tables = plan_tables(skeleton, settings.lora, targets, range(rows, rows + len(settings.lora.new_tokens or ())))
    return shapes.shape_of(skeleton, targets, threshold, tables)


def _what_is_trained(shape: Shape, settings: Config) -> list[str]:
    model = f"{settings.model.path}: {shape.parameters / 1e9:.2f} B parameters"
    if settings.train.mode == "full":
        return [f"{model}, all are trained"]
    adapters = f"{settings.init.method}, r {settings.lora.r}: {shape.adapter / 1e6:.1f} M in the adapters"
    return [f"{model}, {len(shape.targets)} target layers", adapters]


def report(shape: Shape, settings: Config, cluster: Cluster, timed: bool) -> list[str]:
    """What the plan says, line by line; seconds where the ``cluster``'s speeds are known (``timed``)."""
    found = predict(shape, settings, cluster)
    train, data = settings.train, settings.data
    lines = [
        *_what_is_trained(shape, settings),
        f"{cluster.hosts} x {cluster.ranks_per_host} ranks, stage {settings.deepspeed.stage}, shard_group "
        f"{settings.deepspeed.shard_group}, micro-batch {train.micro_batch_size} x {data.max_length} tokens, "
        f"global batch {train.global_batch_size}",
        "",
        f"{'memory of a rank':<18}{'GB':>7}  of {cluster.bytes_per_rank / GB:.0f}, by term",
    ]
    for phase, terms in found.memory.items():
        fits = "" if found.peak(phase) <= cluster.bytes_per_rank else "  DOES NOT FIT"
        named = ", ".join(
            f"{name} {size / GB:.2f}" for name, size in sorted(terms.items(), key=lambda t: -t[1]) if size
        )
        lines.append(f"  {phase:<16}{found.peak(phase) / GB:>7.2f}  {named}{fits}")
    counts = ", ".join(f"{count} in {phase}" for phase, count in found.recomputed.items())
    setting = f"model.recompute = {settings.model.recompute}"
    lines += ["", f"of {shape.layers} blocks backward recomputes {counts}: {setting}"]
    heading = f"{'a rank, predicted':<18}{'GB sent inside':>15}{'between hosts':>15}{'TFLOP':>11}"
    lines += ["", heading + (f"{'seconds':>10}" if timed else "")]
    for phase, seconds in found.seconds.items():
        wire = found.wire.get(phase, Wire()) * (1 / cluster.ranks / GB)
        work = found.operations.get(phase, 0.0) / 1e12
        line = f"  {phase:<16}{wire.inside:>15.2f}{wire.between:>15.2f}{work:>11.1f}"
        lines.append(line + (f"{seconds:>10.2f}" if timed else ""))
    if timed:
        speed = train.global_batch_size * data.max_length / found.seconds["step"]
        lines.append(f"  {speed:.0f} tokens a second over all ranks, if samples fill max_length")
    else:
        lines.append("  no seconds: give what these machines reach, --tflops, --inside_gbs and --between_gbs")
    return lines


def table() -> list[str]:
    """Least peaks of four models on three clusters, and what 80 GB make of the defaults, in Markdown."""
    lines = [
        "| model | hosts x GPUs | load | gradient | SVD | step | fits GPUs of | recomputed | init s | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        path = str(ROOT / "tools/shapes" / name)
        settings = settings_of(None, path, [f"data.max_length={TABLE_LENGTH}"])
        shape = shape_of(settings)
        least = settings_of(None, path, [f"data.max_length={TABLE_LENGTH}", "model.recompute=all"])
        for hosts, each in CLUSTERS:
            cluster = Cluster(hosts, each, bytes_per_rank=(GPUS[1] - RESERVE) * GB)
            peaks = [predict(shape, least, cluster).peak(phase) / GB for phase in ("load", "gradient", "svd", "step")]
            fits = []
            for gpu in GPUS:
                problems = advice(shape, settings, Cluster(hosts, each, bytes_per_rank=(gpu - RESERVE) * GB))
                if not problems:
                    fits.append(f"{gpu}")
                elif not any("No setting" in line for line in problems):
                    fits.append(f"({gpu})")
            found = predict(shape, settings, cluster)
            init = sum(found.seconds[phase] for phase in ("gradient", "svd", "broadcast"))
            speed = settings.train.global_batch_size * TABLE_LENGTH / found.seconds["step"]
            cells = [name, f"{hosts} x {each}", *(f"{peak:.1f}" for peak in peaks), ", ".join(fits) or "none"]
            again = found.recomputed["step"]
            lines.append(
                "| " + " | ".join([*cells, f"{again} of {shape.layers}", f"{init:.0f}", f"{speed:.0f}"]) + " |"
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.table:
        print("\n".join(table()))
        return 0
    path, room = arguments.model, arguments.gpu_gb - arguments.reserve_gb
    if room <= 0:
        print(
            f"--gpu_gb {arguments.gpu_gb:g} with --reserve_gb {arguments.reserve_gb:g}: leaves nothing. Correct them.",
            file=sys.stderr,
        )
        return 1
    if path and Path(path).name == "config.json":
        path = str(Path(path).parent)
    if not path and not arguments.config:
        print("--model or --config must say which model. Give one.", file=sys.stderr)
        return 1
    try:
        settings = settings_of(arguments.config, path, arguments.overrides)
        shape = shape_of(settings)
    except (ConfigError, ModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    timed = arguments.tflops is not None or arguments.backend == "nccl"
    cluster = Cluster(
        arguments.hosts,
        arguments.ranks_per_host,
        bytes_per_rank=room * GB,
        operations=1e12 * (400.0 if arguments.tflops is None else arguments.tflops),
        inside=arguments.inside_gbs * GB,
        between=arguments.between_gbs * GB,
        backend=arguments.backend,
    )
    print("\n".join(report(shape, settings, cluster, timed)))
    problems = advice(shape, settings, cluster)
    better = faster(shape, settings, cluster) if timed and not problems else []
    if better:
        print(f"\nfaster, and it still fits: {'; '.join(better)}")
    print("\n" + ("\n".join(problems) if problems else "every phase fits"))
    return DOES_NOT_FIT if problems else 0
