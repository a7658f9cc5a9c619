"""Memory and step time of every kind of adapter and update beside plain LoRA's, in one run.

    python tools/bench/kinds.py               a 120M model, 2 ranks under ZeRO-3, fp32, 256 tokens a sample

Memory is the peak of live tensor bytes of the fullest rank while training, beside the planner's.  Time is that of a
step, without the first two: runs of all kinds take turns, and each ratio is of a kind's median to plain LoRA's of the
same round; the table shows the ratios' median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import markdown
from tests import ranks
from tools.bench import harness, phases

RANKS, LENGTH, FIRST = 2, 256, 2
KINDS: dict[str, dict[str, str]] = {  # what differs from plain LoRA, which has AdamW alone
    "LoRA": {},
    "LoRA, rescaled": {"optim.preconditioner": "rescaled"},
    "LoRA-Pro": {"optim.preconditioner": "lora_pro"},
    "DoRA": {"lora.kind": "dora"},
    "LoRA-SB": {"lora.kind": "lora_sb", "init.method": "lora_sb", "optim.preconditioner": ""},
}


def config_of(kind: str, folder: Path, model: str) -> dict[str, Any]:
    """A run's, whose initialisation takes nothing but where the kind needs one."""
    raw = phases.write_run(folder, model, RANKS, "world", phases.ZERO, LENGTH)
    raw["init"], raw["optim"]["preconditioner"] = {"method": "lora"}, "none"
    for key, value in KINDS[kind].items():
        group, _, name = key.partition(".")
        raw[group][name] = value or None
    return raw


def step_seconds(raws: list[dict[str, Any]]) -> list[float]:
    """Runs on a rank: the median step of one run after another."""
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.run.story import run

    found = []
    for raw in raws:
        run(parse_config(raw))
        lines = map(json.loads, (Path(raw["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        steps = [LENGTH * RANKS / line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        found.append(statistics.median(steps[FIRST:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(phases.MODELS), default="120M")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks.TIMEOUT_SECONDS = phases.LONGEST_SECONDS
    rows: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = harness.make_model(folder / arguments.model, phases.MODELS[arguments.model])
        for kind, row in rows.items():
            raw = config_of(kind, folder, arguments.model)
            measured = ranks.run_ranks(RANKS, phases.measure, raw, False)[0]["step"]["peak"]
            planned = phases.predicted(raw, 1, RANKS).peak("step")
            row |= {"peak MiB": measured / phases.MIB, "over planned": measured / planned}
        rounds = []
        for _ in range(arguments.rounds):
            raws = [config_of(kind, folder, arguments.model) for kind in KINDS]
            rounds.append(ranks.run_ranks(RANKS, step_seconds, raws)[0])
    for i, row in enumerate(rows.values()):
        row["peak over LoRA's"] = row["peak MiB"] / rows["LoRA"]["peak MiB"]
        row["step seconds"] = statistics.median(seconds[i] for seconds in rounds)
        row["step over LoRA's"] = statistics.median(seconds[i] / seconds[0] for seconds in rounds)
        harness.record("kinds", {"model": arguments.model, "parameters": parameters, "ranks": RANKS, **row})
    print(markdown.table(list(rows.values())))


if __name__ == "__main__":
    main()
