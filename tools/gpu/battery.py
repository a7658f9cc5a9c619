"""Is this machine right for a run, and how fast?  Rows with PASS or FAIL, the figure, and what it should be.

    make gpu                                          both halves, each at most 9 minutes
    python tools/gpu/battery.py --half 1              what must be right; --half 2: how fast, on an 8B shape
    python tools/gpu/battery.py --rows svd,gradient   some rows, each by itself repeatable
    deepspeed tools/gpu/battery.py --rows groups      all GPUs of a job: NCCL over each of its groups

Needs no network and builds nothing.  Without a GPU it runs on the CPU what a CPU can show, on small sizes, and says
what it left out.  Writes JSON beside (--out) with hardware, versions, commit and command.  Exits 1 if a row fails.
tools/gpu/README.md says how to bring what is missing to a machine without network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import harness
from tools.gpu import kernels, runs
from tools.gpu.row import Figure, Skip

SECONDS = 540  # of a half
RANK = int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Row:
    """A check: which half it belongs to, and what it should show."""

    half: int
    check: Callable[[], Figure]
    needs_gpu: bool = False


ROWS: Mapping[str, Row] = {
    "environment": Row(1, kernels.environment),
    "products": Row(1, kernels.products),
    "svd": Row(1, kernels.svd),
    "preconditioner": Row(1, kernels.preconditioner),
    "loss": Row(1, kernels.loss),
    "branch": Row(1, kernels.branch),
    "gradient": Row(1, kernels.gradient),
    "demo": Row(1, runs.demo),
    "two ranks": Row(1, runs.two_ranks),
    "offload": Row(1, runs.offload),
    "groups": Row(1, kernels.groups),
    "init": Row(2, runs.initialise),
    "speed": Row(2, runs.speed),
    "recompute": Row(2, runs.recompute),
    "syncs": Row(2, runs.syncs, needs_gpu=True),
    "packing": Row(2, runs.packing),
    "short samples": Row(2, runs.short_samples),
    "same bits": Row(2, runs.same_bits),
}


def run(name: str, row: Row) -> dict[str, object]:
    """One row: never an exception, so that the next one has its turn."""
    began = time.monotonic()
    result: dict[str, object] = {"row": name, "half": row.half}
    try:
        if row.needs_gpu and not torch.cuda.is_available():
            raise Skip("needs a GPU")
        figure = row.check()
        result |= {"result": "PASS" if figure.ok else "FAIL", "figure": figure.text, "expected": figure.expected}
        result |= {"numbers": figure.numbers}
    except Skip as reason:
        result |= {"result": "LEFT OUT", "figure": str(reason), "expected": ""}
    except Exception as error:  # whatever it is, it is this row's answer
        result |= {"result": "FAIL", "figure": f"{type(error).__name__}: {error}", "expected": "no error"}
        result["traceback"] = traceback.format_exc()
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def show(result: Mapping[str, object]) -> None:
    if RANK == 0:
        expected = f"  (expected: {result['expected']})" if result["expected"] else ""
        start = f"{result['result']:<9}{result['row']:<16}{result['seconds']:>6} s"
        print(f"{start}  {result['figure']}{expected}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", type=int, choices=[1, 2], help="one of the two; both if not given")
    parser.add_argument("--rows", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further row of a half begins")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = arguments.rows.split(",") if arguments.rows else list(ROWS)
    unknown = [name for name in asked if name not in ROWS]
    if unknown:
        parser.error(f"--rows {', '.join(unknown)}: no such row. There are {', '.join(ROWS)}.")
    about = {**harness.about(), "gpus": torch.cuda.device_count()}
    if RANK == 0:
        print(f"{about['hardware']}, {about['versions']}, commit {about['commit']}", flush=True)
    results = []
    for half in (1, 2):
        began = time.monotonic()
        for name in asked:
            if ROWS[name].half != half or arguments.half not in (None, half):
                continue
            if time.monotonic() - began > arguments.seconds:
                results.append({"row": name, "half": half, "result": "LEFT OUT", "figure": "no time left"})
                results[-1] |= {"expected": "", "seconds": 0.0}
            else:
                results.append(run(name, ROWS[name]))
            show(results[-1])
    runs.clean_up()
    if RANK == 0:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n", encoding="utf-8")
        counts = {kind: sum(r["result"] == kind for r in results) for kind in ("PASS", "FAIL", "LEFT OUT")}
        print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f"; {arguments.out}")
    return 1 if any(result["result"] == "FAIL" for result in results) else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # interpreter teardown beside gloo's threads aborts a process now and then
