"""A small language-model study as one command: a base from real text, three tasks, eleven ways to fine-tune it.

    python tools/study/study.py --out runs/study --budget floor        35 minutes on two cores, 9 of them the base
    python tools/study/study.py --out runs/study --budget short        minutes, to see that all of it works
    python tools/study/study.py --out runs/study --report_only         tables and curves of what is done so far

Fetches Debian packages (:mod:`corpus`), trains a tokenizer and a Llama of 1.9 M parameters on them (:mod:`base`), makes
three tasks of paragraphs that the base has not seen (:mod:`tasks`), and runs tools/sweep.py's points: for every method
three learning rates at one seed, one more where the best is at an edge, then the best rate at three seeds.  The
yardstick is full fine-tuning (``train.mode: full``).  What is done is not done again: the same command goes on.

Out: ``--results`` (results/study), small files: study.json, tables.md and curves (:mod:`report`).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a plain checkout too

from lora_one_dist.commands import sweep, sweep_report
from tools.study import base, corpus, forked, report, tasks

ROOT = Path(__file__).resolve().parents[2]
COVERAGE = ((8, "completion"), (64, "completion"), (64, "all"), (512, "all"))  # samples, and tokens with a loss


@dataclass(frozen=True)
class Budget:
    """How much is spent."""

    base_steps: int
    steps: int
    """Of a fine-tuning run."""
    rates: int
    """Learning rates of a method, at most five: the middle ones of its grid."""
    seeds: int
    train_rows: int
    eval_rows: int


BUDGETS = {
    "floor": Budget(base_steps=2400, steps=112, rates=3, seeds=3, train_rows=1792, eval_rows=256),
    "short": Budget(base_steps=60, steps=8, rates=2, seeds=2, train_rows=256, eval_rows=64),
}
BATCH, MAX_LENGTH, R = 16, 64, 16


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: settings, and the learning rates to try."""

    settings: Mapping[str, str]
    rates: tuple[float, ...]


def _adapter(method: str, rslora: bool, rates: tuple[float, ...], **more: str) -> Method:
    settings = {
        "init.method": method,
        "lora.use_rslora": str(rslora).lower(),
        "optim.preconditioner": "none",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    if method in ("lora_one", "lora_one_v1", "lora_ga"):
        settings["init.num_samples"] = "64"
    return Method(settings, rates)


# s = 1 without rsLoRA and 4 with it, at r 16 and alpha 16.
LOW, HIGH = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RESCALED = {"optim__preconditioner": "rescaled"}
METHODS = {
    "full fine-tuning": Method({"train.mode": "full"}, LOW),
    "LoRA": _adapter("lora", False, HIGH),
    "rsLoRA": _adapter("lora", True, HIGH),
    "LoRA+": _adapter("lora", False, LOW, optim__lr_ratio_b="16"),
    "PiSSA": _adapter("pissa", False, LOW),
    "LoRA-GA": _adapter("lora_ga", True, LOW),
    "LoRA-One v1": _adapter("lora_one_v1", True, LOW),
    "LoRA-One": _adapter("lora_one", True, HIGH),
    "LoRA, preconditioned": _adapter("lora", False, HIGH, **RESCALED),
    "LoRA-One v1, preconditioned": _adapter("lora_one_v1", True, LOW, **RESCALED),
    "LoRA-One, preconditioned": _adapter("lora_one", True, HIGH, **RESCALED),
}


def config(out: Path, task: str, budget: Budget, model: Path) -> dict[str, Any]:
    """What all runs of a task start from."""
    return {
        "model": {"path": str(model), "dtype": "fp32", "recompute": "none"},
        "data": {
            "train": str(out / "data" / task / "train.jsonl"),
            "eval": str(out / "data" / task / "eval.jsonl"),
            "max_length": MAX_LENGTH,
        },
        "lora": {"r": R, "alpha": R},
        "optim": {"schedule": "linear", "warmup_steps": budget.steps // 12},
        "train": {
            "max_steps": budget.steps,
            "micro_batch_size": BATCH,
            "global_batch_size": BATCH,
            "exact_match_samples": min(budget.eval_rows, tasks.TASKS[task].most_answers),
            "exact_match_pattern": tasks.TASKS[task].pattern,
            "exact_match_max_new_tokens": tasks.TASKS[task].max_new_tokens,
        },
        "deepspeed": {"config": str(ROOT / "ds_configs" / "stage0.json")},
        "checkpoint": {"steps": 0},
        "output_dir": str(out / "unplaced"),
    }


def write_config(out: Path, task: str, budget: Budget, size: str = base.DEFAULT) -> Path:
    """The YAML that all runs of a task start from."""
    path = out / f"{task}.yaml"
    path.write_text(yaml.safe_dump(config(out, task, budget, out / f"base-{size}"), sort_keys=False), encoding="utf-8")
    return path


class Study:
    """The points of one budget in one folder."""

    def __init__(self, out: Path, budget: Budget, methods: Sequence[str], at_once: int):
        self.out, self.budget, self.methods, self.at_once = out, budget, methods, at_once
        self.failed: dict[str, str] = {}
        self.points: dict[tuple[str, str, float, int], sweep.Point] = {}

    def point(self, task: str, method: str, rate: float, seed: int) -> sweep.Point:
        key = (task, method, rate, seed)
        if key not in self.points:
            chosen = {**METHODS[method].settings, "optim.lr": repr(rate), "train.seed": str(seed)}
            self.points[key] = sweep.make_point(
                self.out / f"{task}.yaml",
                self.out / "runs" / task,
                chosen,
                ["optim.lr", "train.seed"],
                more={"method": method},
            )
        return self.points[key]

    def rates(self, method: str) -> tuple[float, ...]:
        """The middle rates of the method's grid."""
        grid = METHODS[method].rates
        start = (len(grid) - self.budget.rates) // 2
        return grid[start : start + self.budget.rates]

    def sweep_points(self, task: str) -> list[sweep.Point]:
        """Every method at every rate, at the first seed; neighbours in time are different methods."""
        return [self.point(task, m, self.rates(m)[i], 0) for i in range(self.budget.rates) for m in self.methods]

    def edge_points(self, task: str) -> list[sweep.Point]:
        """One rate more for each method whose best is at an edge of its grid."""
        points = []
        for method, best in self.best(task, self.sweep_points(task)).items():
            grid = self.rates(method)
            if len(grid) > 1 and best in (grid[0], grid[-1]):
                # Grids go 1, 3, 10, ...: the next is a decade from the last but one.
                rate = grid[1] / 10 if best == grid[0] else grid[-2] * 10
                points.append(self.point(task, method, float(f"{rate:.1g}"), 0))
        return points

    def seed_points(self, task: str) -> list[sweep.Point]:
        """The best rate of every method at the other seeds."""
        best = self.best(task, [*self.sweep_points(task), *self.edge_points(task)])
        return [self.point(task, m, rate, seed) for seed in range(1, self.budget.seeds) for m, rate in best.items()]

    def best(self, task: str, points: Sequence[sweep.Point]) -> dict[str, float]:
        """The rate of least held-out loss at the first seed, by method; methods without a run are not in it."""
        cells = sweep_report.cells(sweep_report.rows(points, self.failed), "eval_loss", "optim.lr")
        return {dict(cell.group)["method"]: cell.x for cell in sweep_report.best(cells, "eval_loss")}

    def coverage_points(self, task: str) -> list[sweep.Point]:
        """Initialisations alone, at a rank that shows as many singular values: answers are short, texts are not."""
        settings = {**METHODS["LoRA-One"].settings, "lora.r": str(max(map(int, report.COVERAGE_SHOWN)))}
        return [
            sweep.make_point(
                self.out / f"{task}.yaml",
                self.out / "coverage" / task,
                {**settings, "init.num_samples": str(count), "data.loss_on": on, "train.max_steps": "0"},
                ["init.num_samples", "data.loss_on"],
            )
            for count, on in COVERAGE
        ]

    def run(self) -> None:
        """Everything that is not done yet."""
        for task in tasks.TASKS:
            self._run(self.coverage_points(task))
        for task in tasks.TASKS:
            for stage in (self.sweep_points, self.edge_points, self.seed_points):
                print(f"{task}: {stage.__name__.replace('_', ' ')}", flush=True)
                self._run(stage(task))

    def _run(self, points: Sequence[sweep.Point]) -> None:
        self.failed |= sweep.run(points, self.at_once, say=lambda line: print(line, flush=True), start=forked.start)


@contextlib.contextmanager
def problems_told() -> Iterator[None]:
    """Inside, an interruption and what a user can mend end the command with a line and sweep's exit codes."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: all runs are ended; the same command goes on", file=sys.stderr)
        raise SystemExit(sweep.INTERRUPTED) from None
    except (corpus.CorpusError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(sweep.BAD_CONFIG) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of base, data and runs")
    parser.add_argument("--budget", choices=list(BUDGETS), default="floor")
    parser.add_argument("--size", choices=list(base.SIZES), default=base.DEFAULT, help="parameters of the base")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "study", help="folder of tables and curves")
    parser.add_argument("--at_once", type=int, default=2, help="runs at one time, a thread each (2)")
    parser.add_argument("--base_only", action="store_true", help="stop when base and data are made")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    args = parser.parse_args()
    budget = BUDGETS[args.budget]
    study = Study(args.out, budget, list(METHODS), args.at_once)
    with problems_told():
        facts = base.make(args.out / "packages", args.out / f"base-{args.size}", budget.base_steps, size=args.size)
        if not args.report_only:
            prepare(args.out, budget, args.size)
            if args.base_only:
                return 0
            with sweep.sigterm_interrupts():
                study.run()
    report.write(study, facts, args.results)
    return 1 if study.failed else 0


def prepare(out: Path, budget: Budget, size: str = base.DEFAULT) -> None:
    """The tasks' data and the config that their runs start from."""
    paragraphs = corpus.paragraphs(out / "packages")
    tasks.write(paragraphs, out / "data", budget.train_rows, budget.eval_rows, seed=0)
    for task in tasks.TASKS:
        write_config(out, task, budget, size)


if __name__ == "__main__":
    sys.exit(main())
