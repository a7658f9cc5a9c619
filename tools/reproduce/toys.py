"""Run the toy experiments behind LoRA-One and hold the figures beside those expected.

    python tools/reproduce/toys.py                                  all four, 10 seeds
    python tools/reproduce/toys.py --only alignment,relu --seeds 3
    python tools/reproduce/toys.py --short                          smaller sizes, 2 seeds; expects nothing

Prints a table, and writes toys.json (every number, settings, versions, commit) and a picture of each experiment into
--out, over those of an earlier run.  The paper (arXiv 2502.01235) shows curves; the expected numbers are those of an
independent NumPy programme on one draw of the same settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_one_dist.commands import command_line, markdown
from lora_one_dist.run import metrics
from tools.bench import harness
from tools.reproduce import figures
from tools.reproduce.experiments import EXPERIMENTS, Result, Settings

SEEDS = 10
SHORT_SEEDS = 2
SHORT: dict[str, Any] = {
    "size": 40,
    "samples": 640,
    "variances": (1.0, 0.01, 0.0001),
    "alignment_steps": 600,
    "relu_samples": 4000,
}
NEVER = "never"

# One draw each; "<" is a bound.  LoRA-GA's scale was not noted with its number: gamma 4 is where ours meets it.
EXPECTED: dict[str, dict[str, str]] = {
    "alignment": {
        "share of B outside, largest": "< 1e-8",
        "least sine, variance 1": "0.998",
        "least sine, variance 0.1": "0.982",
        "least sine, variance 0.01": "0.496",
        "least sine, variance 0.001": "0.207",
        "least sine, variance 0.0001": "0.135",
    },
    "initialisation": {
        "LoRA-One, step 50": "4e-4",
        "LoRA-One, step 500": "5e-11",
        "LoRA, step 50": "0.25",
        "LoRA, step 500": "3e-3",
        "LoRA-GA, gamma 4, step 500": "0.048",
        "LoRA-SB, step 500": "0.053",
    },
    "conditioning": {
        "LoRA-One, preconditioned, condition 1": "15",
        "LoRA-One, preconditioned, condition 10": "14",
        "LoRA-One, preconditioned, condition 100": "13",
        "LoRA-One, condition 1": "20",
        "LoRA-One, condition 10": "135",
        "LoRA-One, condition 100": NEVER,
    },
    "relu": {
        **{f"LoRA-One, preconditioned, condition {c}, step 0": "0.05" for c in (1, 4, 20)},
        **{f"LoRA-One, preconditioned, condition {c}, step 30": "8e-6" for c in (1, 4, 20)},
        **{f"LoRA-One, preconditioned, condition {c}, step 60": "2e-9" for c in (1, 4, 20)},
        "LoRA-One, condition 1, step 60": "8e-8",
        "LoRA-One, condition 4, step 60": "5e-4",
        "LoRA-One, condition 20, step 60": "5e-3",
    },
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("--short", action="store_true", help="smaller sizes, seconds; nothing is expected of them")
    parser.add_argument("--only", type=names, default=list(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    parser.add_argument(
        "--seeds", type=command_line.positive, help=f"how many draws ({SEEDS}; {SHORT_SEEDS} with --short)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/toys"), help="folder (runs/toys)")
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    """Experiments, separated by commas."""
    found = text.split(",")
    unknown = [name for name in found if name not in EXPERIMENTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: no such experiment. Choose of {', '.join(EXPERIMENTS)}."
        )
    return found


def within(expected: str, values: Sequence[float]) -> bool:
    """Is a number, as rounded as it is written, in the range of the seeds?  A bound must hold for all of them."""
    if expected == NEVER:
        return all(math.isinf(value) for value in values)
    if expected.startswith("<"):
        return max(values) < float(expected[1:])
    number = Decimal(expected)
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int), f"{expected} is a number"
    half = 0.5 * 10.0**exponent
    return min(values) <= float(number) + half and max(values) >= float(number) - half


def table(result: Result, expected: Mapping[str, str]) -> str:
    rows = []
    for name, values in result.rows.items():
        number = expected.get(name)
        rows.append(
            {
                "quantity": name,
                "expected": number or "",
                "median": shown(median(values)),
                "least": shown(min(values)),
                "most": shown(max(values)),
                "within": "" if number is None else ("yes" if within(number, values) else "NO"),
            }
        )
    return markdown.table(rows)


def shown(value: float) -> str:
    return NEVER if math.isinf(value) else f"{value:.3g}"


def record(
    results: Mapping[str, Result],
    seconds: Mapping[str, float],
    settings: Settings,
    expected: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """All of a run, as JSON has it: null for what was never reached, curves as medians over the seeds."""

    def number(value: float) -> float | None:
        return float(f"{value:.6g}") if math.isfinite(value) else None

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "command": sys.argv,
        "commit": harness.commit(),
        "hardware": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **metrics.versions()},
        "settings": asdict(settings),
        "experiments": {
            name: {
                "seconds": round(seconds[name], 1),
                "rows": {row: [number(value) for value in values] for row, values in result.rows.items()},
                "expected": expected[name],
                "curves": {
                    curve: [number(value) for value in values.median(1).values.tolist()]
                    for curve, values in result.curves.items()
                },
            }
            for name, result in results.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    seeds = tuple(range(arguments.seeds or (SHORT_SEEDS if arguments.short else SEEDS)))
    settings = Settings(seeds=seeds, **(SHORT if arguments.short else {}))
    arguments.out.mkdir(parents=True, exist_ok=True)
    expected = {name: {} if arguments.short else EXPECTED[name] for name in arguments.only}
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name in arguments.only:
        began = time.perf_counter()
        results[name] = EXPERIMENTS[name](settings)
        seconds[name] = time.perf_counter() - began
        picture = figures.save(name, results[name], settings, expected[name], arguments.out)
        print(
            f"{name}, {len(seeds)} seeds, {seconds[name]:.1f} s: {picture}\n\n{table(results[name], expected[name])}\n"
        )
    path = arguments.out / "toys.json"
    path.write_text(json.dumps(record(results, seconds, settings, expected)) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
