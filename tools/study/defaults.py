"""Which defaults win: forms of the preconditioner and settings of the start, each at its own best learning rate.

    python tools/study/defaults.py --out runs/study                    every stage, or what is still missing
    python tools/study/defaults.py --out runs/study --stage forms      one of them
    python tools/study/defaults.py --out runs/study --report_only      tables and plots of what is done

The plan, with the rule of what wins, was written before the first run: results/defaults/PLAN.md.  A cell is a base and
a task; a variant is a form (:mod:`forms`) with other settings.  Every variant has three rates half a decade apart, and
more on the side where the least loss is at an edge; then the best rate at five other seeds.  Runs are those of
launch/train.py, one rank each, two at once; what is done is not done again.

Out: ``--results`` (results/defaults): runs.jsonl, tables.md, plots.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a plain checkout too

from lora_one_dist.commands import sweep
from tools.study import base, defaults_report, forked, forms, study, tasks

ROOT = Path(__file__).resolve().parents[2]
TRAIN_FORM = ROOT / "tools" / "study" / "train_form.py"
BUDGET = study.BUDGETS["floor"]
FRESH_SEEDS, MORE_SEEDS, MAX_RUNS, EXTENSIONS = 5, 15, 600, 3
HALF_DECADES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DEMO = "demo"


@dataclass(frozen=True)
class Variant:
    """One choice of settings."""

    name: str
    form: str
    """Of the preconditioner, by train_form.py."""
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    middle: float = 3e-3
    """Of the three rates to begin with."""


@dataclass(frozen=True)
class Stage:
    """Some variants on some cells."""

    name: str
    cells: tuple[str, ...]
    variants: tuple[Variant, ...]
    fresh: int = 0
    """Seeds beside the one that chooses the rate, on which alone the stage is judged."""
    baseline: str = "none"
    """The variant that the others are compared with."""


# Of the three rates to begin with: where steps shrink or grow with the Grams the rates are others.
MIDDLES = {"around, not rescaled": 3e-4, "whitened (LoRA-RITE)": 3e-4, "after, not rescaled": 1e-3, "paper": 1e-2}
FADING = Variant("rescaled, fading", "rescaled, fading")  # tried after all others
FORMS = tuple(Variant(name, name, middle=MIDDLES.get(name, 3e-3)) for name in forms.FORMS if name != FADING.name)
WHY = (  # interventions beside the forms, for the table of hypotheses
    Variant("paper, beta2 0.99", "paper", {"optim.betas": "[0.9,0.99]"}, 1e-2),
    Variant("paper, beta2 0.9", "paper", {"optim.betas": "[0.9,0.9]"}, 1e-2),
    Variant("none, beta2 0.99", "none", {"optim.betas": "[0.9,0.99]"}),
    Variant("paper, no clipping", "paper", {"optim.max_grad_norm": "0"}, 1e-2),
    Variant("none, no clipping", "none", {"optim.max_grad_norm": "0"}),
    Variant("paper, eps 1e-12", "paper", {"optim.eps": "1e-12"}, 1e-2),
    Variant("none, eps 1e-12", "none", {"optim.eps": "1e-12"}),
)
WINNER = "rescaled, relative 1"  # of the first stage
RIVAL_NAMES = ("after, relative 1", "around, not rescaled", "rescaled, relative 0.1")  # the next best
FACTORS = (
    Variant(WINNER, WINNER),
    Variant("none", "none"),
    Variant("paper", "paper"),
    Variant("gamma 16", WINNER, {"init.gamma": "16"}),
    Variant("gamma 1024", WINNER, {"init.gamma": "1024"}),
    Variant("8 samples", WINNER, {"init.num_samples": "8"}),
    Variant("no rsLoRA", WINNER, {"lora.use_rslora": "false"}, 1e-2),
)
FINALISTS = tuple(Variant(name, name) for name in ("none", WINNER))
RIVALS = tuple(variant for variant in FORMS if variant.name in RIVAL_NAMES)
SMALL = tuple(f"1.9M/{task}" for task in tasks.TASKS)
LARGE = tuple(f"5.5M/{task}" for task in tasks.TASKS)
# Rates of cells where the first seed was not run: what was best there for both finalists.
SETTLED = {(cell, FADING.name): 3e-3 for cell in LARGE}
EVERY = (DEMO, *(f"{size}/{task}" for size in base.SIZES for task in tasks.TASKS))
STAGES = {
    stage.name: stage
    for stage in (
        Stage("forms", SMALL, FORMS),
        Stage("why", ("1.9M/gap", "1.9M/words"), WHY),
        Stage("factors", EVERY[1:], FACTORS),
        Stage("seeds", EVERY, FINALISTS, FRESH_SEEDS),
        Stage("rivals", SMALL, (*FINALISTS, *RIVALS), FRESH_SEEDS),
        Stage("more seeds", (DEMO, "5.5M/source"), FINALISTS, MORE_SEEDS),
        Stage("fading", (DEMO, *SMALL), (*FINALISTS, FADING), FRESH_SEEDS),
        Stage("fading, large", LARGE, (*FINALISTS, FADING), FRESH_SEEDS),
        Stage("fading, demo", (DEMO,), (*FINALISTS, FADING), 11),
        Stage("samples", SMALL, tuple(v for v in FACTORS if v.name in (WINNER, "8 samples")), FRESH_SEEDS, WINNER),
    )
}


def write_configs(out: Path) -> None:
    """``out/defaults/<base>-<task>.yaml`` for every cell, LoRA-One at this package's defaults but for what the study
    fixes."""
    folder = out / "defaults"
    folder.mkdir(exist_ok=True)
    for size in base.SIZES:
        for task in tasks.TASKS:
            raw = study.config(out, task, BUDGET, out / f"base-{size}")
            raw["init"] = {"num_samples": 64}
            _write(folder / f"{size}-{task}.yaml", raw)
    raw = yaml.safe_load((ROOT / "launch" / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    raw["deepspeed"]["config"] = str(ROOT / "ds_configs" / "stage0.json")
    raw["optim"] = {key: raw["optim"][key] for key in ("schedule", "warmup_steps")}
    raw["train"]["eval_steps"] = 0
    raw["model"]["path"] = str(ROOT / raw["model"]["path"])
    for key in ("train", "eval"):
        raw["data"][key] = str(ROOT / raw["data"][key])
    _write(folder / f"{DEMO}.yaml", raw)


def _write(path: Path, raw: dict[str, dict[str, object]]) -> None:
    """Without answers: what is chosen by is the held-out loss.  The package's own preconditioner is not used."""
    raw["model"]["recompute"] = "none"
    raw["optim"] |= {"preconditioner": "riemannian", "damping": 1e-6}  # as it was: another default is the same run
    raw["checkpoint"] = {"steps": 0}
    raw["train"] = {key: value for key, value in raw["train"].items() if not key.startswith("exact_match")}
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")


class Runs:
    """The points of the study in one folder."""

    def __init__(self, out: Path, at_once: int):
        self.out, self.at_once = out, at_once
        self.failed: dict[str, str] = {}
        self.points: dict[tuple[str, Variant, float, int], sweep.Point] = {}

    def point(self, cell: str, variant: Variant, rate: float, seed: int) -> sweep.Point:
        key = (cell, variant, rate, seed)
        if key not in self.points:
            point = sweep.make_point(
                self.out / "defaults" / f"{cell.replace('/', '-')}.yaml",
                self.out / "defaults" / "runs" / cell.replace("/", "-"),
                {**variant.settings, "optim.lr": repr(rate), "train.seed": str(seed)},
                ["optim.lr", "train.seed"],
                TRAIN_FORM,
                {"variant": variant.name},
            )
            self.points[key] = replace(point, arguments=("--form", variant.form, *point.arguments))
        return self.points[key]

    def loss(self, cell: str, variant: Variant, rate: float, seed: int) -> float | None:
        """Held-out loss at the end; None: not run, or failed."""
        summary = self.point(cell, variant, rate, seed).summary()
        return None if summary is None else float(summary["after"]["eval_loss"])

    def rates(self, cell: str, variant: Variant) -> dict[float, float]:
        """Held-out loss at the first seed by rate, of what is done."""
        found = {rate: self.loss(cell, variant, rate, 0) for rate in HALF_DECADES}
        return {rate: loss for rate, loss in found.items() if loss is not None}

    def tried(self, cell: str, variant: Variant) -> list[float]:
        """The rates at which a run of the first seed ended, failed ones too."""
        points, failed = {rate: self.point(cell, variant, rate, 0) for rate in HALF_DECADES}, self.failures()
        return [rate for rate, point in points.items() if point.name in failed or point.summary() is not None]

    def all_variants(self) -> list[Variant]:
        """Of all stages."""
        return [variant for stage in STAGES.values() for variant in stage.variants]

    def best(self, cell: str, variant: Variant) -> float | None:
        """The rate of least loss at the first seed; or the one that is settled."""
        losses = self.rates(cell, variant)
        return min(losses, key=lambda rate: losses[rate]) if losses else SETTLED.get((cell, variant.name))

    def wanted(self, stage: Stage) -> list[sweep.Point]:
        """The runs that come next: three rates, then one more at an edge, then the seeds of the best rate."""
        first = [
            self.point(cell, variant, rate, 0)
            for cell, variant in _pairs(stage)
            for rate in ([] if (cell, variant.name) in SETTLED else _around(variant.middle))
            if self.loss(cell, variant, rate, 0) is None
        ]
        if left := [point for point in first if point.name not in self.failed]:
            return left
        edges = [
            self.point(cell, variant, rate, 0) for cell, variant in _pairs(stage) for rate in self._edge(cell, variant)
        ]
        if edges:
            return edges
        seeds = [
            self.point(cell, variant, best, seed)
            for seed in range(1, stage.fresh + 1)
            for cell, variant in _pairs(stage)
            if (best := self.best(cell, variant)) is not None and self.loss(cell, variant, best, seed) is None
        ]
        return [point for point in seeds if point.name not in self.failed]

    def _edge(self, cell: str, variant: Variant) -> list[float]:
        losses = self.rates(cell, variant)
        if not losses or len(losses) >= 3 + EXTENSIONS:
            return []
        best, at = self.best(cell, variant), sorted(losses)
        place = HALF_DECADES.index(best)
        beyond = place + 1 if best == at[-1] else place - 1 if best == at[0] else -1
        if not 0 <= beyond < len(HALF_DECADES):
            return []
        rate = HALF_DECADES[beyond]
        return [] if self.point(cell, variant, rate, 0).name in self.failed else [rate]

    def failures(self) -> dict[str, str]:
        """What is kept of runs that failed and were not run again, by name."""
        path = self.out / "defaults" / "failed.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {**kept, **self.failed}

    def run(self, stage: Stage) -> None:
        """Everything of a stage that is not done."""
        while points := self.wanted(stage):
            done = len(list((self.out / "defaults" / "runs").glob("*/*/summary.json")))
            if done + len(points) > MAX_RUNS:
                raise ValueError(
                    f"{done} runs are done and {len(points)} wanted: more than {MAX_RUNS}, the plan's limit."
                )
            print(f"{stage.name}: {done} runs are done", flush=True)
            self.failed |= sweep.run(points, self.at_once, say=_say, start=forked.start)
            (self.out / "defaults" / "failed.json").write_text(json.dumps(self.failures(), indent=1), encoding="utf-8")


def _pairs(stage: Stage) -> Iterator[tuple[str, Variant]]:
    return ((cell, variant) for variant in stage.variants for cell in stage.cells)


def _around(middle: float) -> Sequence[float]:
    place = HALF_DECADES.index(middle)
    return HALF_DECADES[place - 1 : place + 2]


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of bases, data and runs")
    parser.add_argument("--stage", choices=list(STAGES), help="only this one")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "defaults", help="folder of the tables")
    parser.add_argument("--at_once", type=int, default=2, help="runs at one time, a thread each (2)")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    args = parser.parse_args()
    chosen = [STAGES[args.stage]] if args.stage else list(STAGES.values())
    runs = Runs(args.out.resolve(), args.at_once)
    with study.problems_told():
        for size in base.SIZES:
            base.make(args.out / "packages", args.out / f"base-{size}", BUDGET.base_steps, size=size)
        study.prepare(args.out, BUDGET)
        write_configs(runs.out)
        if not args.report_only:
            with sweep.sigterm_interrupts():
                for stage in chosen:
                    runs.run(stage)
    defaults_report.write(runs, list(STAGES.values()), args.results)
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
