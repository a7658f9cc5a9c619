"""Does a run that was killed, at whatever point, go on to the same end?

    .venv/bin/python tests/kill_harness.py [--random 25] [--short]

A small job on 2 ranks kills itself with SIGKILL at a named point, or is killed from outside at a random moment; then
the same config is started again until it ends.  Equal means: the same bits of every loss, gradient norm, learning rate
and evaluation, each once and in order, the same adapter and checkpoints, and nothing left behind.  Prints a Markdown
table; exits 1 if any trial was not equal.  The points are planted here: the package has no hook for them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)

from tests import conftest, models  # noqa: E402, F401 (conftest sets the environment)
from tests.ranks import start_commands, write_json_lines  # noqa: E402

RANKS = 2
SECONDS = 90  # for an attempt that takes about four, on a busy machine
LAYERS, GROUPS, PARTS = 14, 2, 2  # targets of two blocks, layer groups, halves of the init batch
SOONER = 0.8  # when a run was over before its moment came
SVDS = 3  # of a layer: its gradient's and both halves'
START, FIRST_GROUP, BOTH_GROUPS, END = "the start", "layer group 1", "layer group 2", "its end"
COMPARED = ("loss", "grad_norm", "lr", "eval_loss", "exact_match")


@dataclass(frozen=True)
class Point:
    """A call of a function of the package, at which a rank kills itself."""

    name: str
    at: str
    """room.module.function or room.module.Class.method: where its name is looked up when it is called."""
    goes_on: str
    """What the next start must go on from: START, a layer group, 'step N' or END."""
    rank: int = 0
    where: str = ""
    """Only calls with this in the text of an argument count."""
    call: int = 1
    how: str = "before"
    """before or after the call; or half: of the file, or of the line, that it writes."""
    method: str = "lora_one"
    both: bool = False
    """Also tried with all ranks killed at once."""
    first: str = ""
    """The point at which the run was killed before: this one is met by its second process."""


GRADIENT = [
    Point("reading the base", "base.sharding._read_own", START, rank=1, call=5),
    Point("after run.json, before config.yaml", "disk.folders.replace_file", START, where="config.yaml", both=True),
    Point("evaluation of the base", "train.evaluate.loss_sum", START, rank=1, call=2),
    Point("backward of the gradient phase", "initialise.gradient.weight_gradient", START, rank=1, call=9, both=True),
    Point(
        "between micro-batches of the gradient phase",
        "initialise.gradient._OwnerSums.end_micro_batch",
        START,
        how="after",
    ),
    Point("in an SVD", "initialise.spectral.truncated_svd", START, rank=1, call=4, both=True),
    Point("after the last SVD of a layer group", "initialise.pairs._broadcast", START),
    Point("broadcast of the pairs", "cluster.comm.broadcast", START, rank=1, call=2),
]
INITIALISED = [
    Point("before a layer group's files", "disk.folders._write_file", START, rank=1, where=".init-1-of-2.partial"),
    Point("half of a layer group's file", "disk.folders._write_file", START, where=".init-1-of-2.partial", how="half"),
    Point("before a layer group is renamed", "disk.folders._complete", START, where=".init-1-of-2.partial", both=True),
    Point(
        "between layer groups", "disk.folders.write", FIRST_GROUP, rank=1, where="init-1-of-2", how="after", both=True
    ),
    Point("second group's gradient", "initialise.gradient.weight_gradient", FIRST_GROUP, call=20),
    Point("after the last layer group", "disk.folders.write", BOTH_GROUPS, where="init-2-of-2", how="after", both=True),
    Point("setting adapters", "run.beginning.set_adapters", BOTH_GROUPS, rank=1),
    Point("changing the base", "adapters.lora.add_low_rank", BOTH_GROUPS, call=5, method="lora_one_v1", both=True),
    Point(
        "writing the initial adapter", "disk.folders._write_file", BOTH_GROUPS, where=".adapter_init.partial", call=2
    ),
    Point("after the initial adapter", "disk.folders.replace", BOTH_GROUPS, where="/adapter_init'", how="after"),
]
STEP_0 = [
    Point(
        "step 0: before own file", "disk.folders._write_file", BOTH_GROUPS, rank=1, where=".step-0.partial", both=True
    ),
    Point(
        "step 0: half of a file",
        "disk.folders._write_file",
        BOTH_GROUPS,
        where="optimizer-00000",
        how="half",
        both=True,
    ),
    Point("step 0: before the manifest", "disk.folders._complete", BOTH_GROUPS, where=".step-0.partial"),
    Point("step 0: before the rename", "disk.folders.sync_folder", BOTH_GROUPS, where=".step-0.partial", both=True),
    Point("step 0: before `latest`", "disk.folders.replace_file", "step 0", where="latest", both=True),
    Point("step 0: after `latest`", "disk.folders.replace_file", "step 0", rank=0, where="latest", how="after"),
    Point(
        "step 0: removing layer groups", "disk.folders.shutil.rmtree", "step 0", where=".init-1-of-2.removed", call=2
    ),
]
BOUNDARY = [
    Point("forward of step 3", "train.loop._forward_backward", "step 2", rank=1, call=3),
    Point(
        "between backward and optimizer of step 3",
        "train.optim.LayerShardedOptimizer.reduce",
        "step 2",
        call=3,
        both=True,
    ),
    Point("in the reduce-scatter of step 3", "cluster.hierarchy._exchange_and_sum", "step 2", rank=1, call=5),
    Point("in the update of step 1", "train.optim.adamw_", "step 0", rank=1, call=2, both=True),
    Point(
        "after the update of step 4", "train.optim.LayerShardedOptimizer._update", "step 3", rank=1, call=4, how="after"
    ),
    Point("between update and all-gather of step 4", "cluster.hierarchy.all_gather", "step 3", call=4, both=True),
    Point("after step 4, before its log", "run.metrics.RunFolder.log", "step 3", where="'loss'", call=4, both=True),
    Point("half of a line of metrics.jsonl", "run.metrics.RunFolder.log", "step 3", where="'loss'", call=4, how="half"),
    Point("after step 4's log", "run.metrics.RunFolder.log", "step 3", where="'loss'", call=4, how="after", both=True),
    Point("in an evaluation", "train.evaluate.loss_sum", "step 2", rank=1, call=4),
    Point("after an evaluation, before its log", "run.metrics.RunFolder.log", "step 2", where="'eval_loss'", call=2),
    Point("after an evaluation's log", "run.metrics.RunFolder.log", "step 2", where="'eval_loss'", call=2, how="after"),
]
LATER = [
    Point("step 2: before own file", "disk.folders._write_file", "step 0", rank=1, where=".step-2.partial"),
    Point(
        "step 2: half of a file", "disk.folders._write_file", "step 0", where=".step-2.partial", how="half", both=True
    ),
    Point("step 2: before the manifest", "disk.folders._complete", "step 0", where=".step-2.partial"),
    Point("step 2: before the rename", "disk.folders.sync_folder", "step 0", where=".step-2.partial", both=True),
    Point("step 2: before `latest`", "disk.folders.replace_file", "step 2", where="latest", call=2, both=True),
    Point("pruning, before", "disk.folders.remove", "step 3", where="step-0"),
    Point(
        "pruning, between rename and removal", "disk.folders.shutil.rmtree", "step 3", where=".step-0.removed", call=2
    ),
    Point("the best saved, best.json not", "disk.folders.replace_file", "step 3", where="best.json", both=True),
    Point("best.json half written", "disk.folders._write_file", "step 3", where=".best.json.partial", how="half"),
    Point("best.json written", "disk.folders.replace_file", "step 3", rank=0, where="best.json", how="after"),
    Point(
        "the last checkpoint renamed, before `latest`", "disk.folders.replace_file", "step 6", where="latest", call=5
    ),
]
ENDING = [
    Point("evaluation after training", "run.story.evaluate", "step 6", rank=1, call=3),
    Point("best.json at the end", "disk.folders.replace_file", "step 6", where="best.json", call=2),
    Point("before the adapter is exported", "disk.folders.replace", "step 6", where="/adapter'", both=True),
    Point("half of the adapter", "disk.folders._write_file", "step 6", where="/.adapter.partial/", call=2, how="half"),
    Point("after the adapter, before summary.json", "disk.folders.replace", "step 6", where="/adapter'", how="after"),
    Point("after summary.json", "run.metrics.RunFolder.write_json", END, where="summary.json", how="after", both=True),
]
STOPPED_AT = "after step 4's log"
RESUMING = [
    Point("resume: checking hashes", "disk.folders.fault", "step 3", rank=1, first=STOPPED_AT, both=True),
    Point("resume: metrics.jsonl cut", "run.metrics.RunFolder.__init__", "step 3", first=STOPPED_AT, how="after"),
    Point("resume: opening the checkpoints", "run.checkpoint.Store.open", "step 3", first=STOPPED_AT, both=True),
    Point(
        "resume: the checkpoints opened", "run.checkpoint.Store.open", "step 3", rank=1, first=STOPPED_AT, how="after"
    ),
    Point(
        "resume: reading the optimizer", "run.checkpoint.load_optimizer", "step 3", rank=1, first=STOPPED_AT, both=True
    ),
    Point("resume: sharing the adapters", "train.optim.LayerShardedOptimizer._share", "step 3", first=STOPPED_AT),
    Point(
        "resume: changing the base again",
        "adapters.lora.add_low_rank",
        "step 3",
        rank=1,
        call=5,
        method="lora_one_v1",
        first=STOPPED_AT,
    ),
    Point(
        "resume: after one more step",
        "train.optim.LayerShardedOptimizer.update",
        "step 3",
        first=STOPPED_AT,
        how="after",
    ),
    Point(
        "resume: reading a layer group", "run.checkpoint.Store.load_group", FIRST_GROUP, first="between layer groups"
    ),
    Point(
        "resume: removing an old export",
        "disk.folders.shutil.rmtree",
        "step 6",
        where="/.adapter.removed",
        call=2,
        first="after the adapter, before summary.json",
    ),
]
POINTS = {point.name: point for point in (*GRADIENT, *INITIALISED, *STEP_0, *BOUNDARY, *LATER, *ENDING, *RESUMING)}
SHORT = (
    ("between layer groups", False),
    ("changing the base", True),
    ("step 0: before the rename", True),
    ("between update and all-gather of step 4", False),
    ("the best saved, best.json not", True),
    ("resume: reading the optimizer", False),
)


@dataclass(frozen=True)
class Moment:
    """Seconds after the start at which ranks are killed from outside."""

    seconds: float
    ranks: tuple[int, ...]


@dataclass
class Trial:
    """What became of a killed run."""

    name: str
    killed: str
    goes_on: str
    seconds: float
    faults: list[str] = field(default_factory=list)


# In the job -----------------------------------------------------------------------------------------------------------


def job(raw: dict, folder: Path, point: Point | None, everyone: bool) -> None:
    """Runs on a rank: the run, with what shall kill it planted; leaves its process id, and what it has computed."""
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.run.story import run

    rank = os.environ["RANK"]
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    counts = {
        "gradients": _count("initialise.pairs.full_gradient"),
        "svds": _count("initialise.spectral.truncated_svd"),
    }
    if point is not None and int(rank) == point.rank:
        _plant(point, folder, everyone)
    run(parse_config(raw))
    (folder / f"{rank}.counts").write_text(json.dumps({name: len(calls) for name, calls in counts.items()}))


def _place(at: str) -> tuple[Any, str]:
    """The object that holds what is called so in the package, and its name there."""
    *path, name = at.split(".")
    holder: Any = importlib.import_module("lora_one_dist")
    for part in path:  # modules as long as there are any, then what they hold
        is_package = hasattr(holder, "__path__")
        holder = importlib.import_module(f"{holder.__name__}.{part}") if is_package else getattr(holder, part)
    return holder, name


def _count(at: str) -> list[None]:
    calls: list[None] = []
    holder, name = _place(at)
    original = getattr(holder, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    setattr(holder, name, counted)
    return calls


def _plant(point: Point, folder: Path, everyone: bool) -> None:
    holder, name = _place(point.at)
    original, calls = getattr(holder, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        matches = not point.where or point.where in " ".join(repr(arg) for arg in args)
        calls += matches
        if not matches or calls != point.call:
            return original(*args, **kwargs)
        if point.how != "before":
            (_half if point.how == "half" else original)(*args, **kwargs)
        (folder / "reached").write_text(point.name)
        others = [rank for rank in range(RANKS) if rank != point.rank] if everyone else []
        for pid in [int((folder / f"{rank}.pid").read_text()) for rank in others]:
            os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(holder, name, deadly)


def _half(target: Any, value: Any, *_: Any) -> None:
    """Write the first half of a file's content, or of a line of metrics.jsonl."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(value[: len(value) // 2])
    else:
        with (target.root / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": value})[:-1])


# Around it ------------------------------------------------------------------------------------------------------------


class Harness:
    """Trials in one folder, with the runs that were never killed to compare with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.straight: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        models.llama(layers=2).save_pretrained(folder / "model", max_shard_size="20KB")
        models.tokenizer("llama").save_pretrained(folder / "model")
        write_json_lines(folder / "train.jsonl", models.rows(30))
        write_json_lines(folder / "eval.jsonl", models.rows(6, seed=1))

    def settings(self, out: Path, method: str) -> dict[str, Any]:
        """Dropout shows whether randomness goes on; the step of an evaluation is not one of a checkpoint."""
        return {
            "model": {"path": str(self.folder / "model"), "dtype": "fp32"},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "eval": str(self.folder / "eval.jsonl"),
                "max_length": 32,
            },
            "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
            "init": {"method": method, "layer_groups": GROUPS, "halves": True},
            "optim": {"lr": 5e-3, "warmup_steps": 1},
            "train": {"max_steps": 6, "micro_batch_size": 2, "global_batch_size": 7, "eval_steps": 3},
            "checkpoint": {"steps": 2},
            "output_dir": str(out),
        }

    def reference(self, method: str) -> dict[str, Any]:
        """What a run that was never killed leaves."""
        if method not in self.straight:
            found = []
            for number in range(1 if self.straight else 2):  # do runs repeat? And the first one pays for the imports
                folder = self._folder(f"straight-{method}-{number}")
                started = time.monotonic()
                codes = self._attempt(folder, method)
                self.seconds = time.monotonic() - started
                assert codes == [0] * RANKS, _stderr(folder)
                assert _computed(folder) == _work(START)
                found.append(outcome(folder / "run"))
            assert found[0] == found[-1]
            self.straight[method] = found[0]
        return self.straight[method]

    def at_point(self, point: Point, everyone: bool) -> Trial:
        """Kill a run at a point, once or (``first``) after it was killed before; then let it end."""
        reference, folder = self.reference(point.method), self._folder("trial")
        trial = Trial(point.name, "all" if everyone else f"rank {point.rank}", "", 0.0)
        started = time.monotonic()
        earlier = [POINTS[point.first]] if point.first else []
        for met in (*earlier, point):
            (folder / "reached").unlink(missing_ok=True)
            codes = self._attempt(folder, point.method, met, everyone)
            reached = (folder / "reached").exists() and (folder / "reached").read_text() == met.name
            if not reached:
                trial.faults.append(f"{met.name} was not reached")
            self._check_death(trial, codes, range(RANKS) if everyone else [met.rank])
        self._finish(trial, folder, reference, point.method)
        if trial.goes_on != point.goes_on:
            trial.faults.append(f"went on from {trial.goes_on}, not {point.goes_on}")
        trial.seconds = time.monotonic() - started
        return trial

    def at_moments(self, name: str, moments: Sequence[Moment]) -> Trial:
        """Kill a run from outside, and if there are more moments then again what was started next."""
        reference, folder = self.reference("lora_one"), self._folder("trial")
        killed = ", then ".join("all" if len(m.ranks) == RANKS else f"rank {m.ranks[0]}" for m in moments)
        trial = Trial(name, killed, "", 0.0)
        started = time.monotonic()
        for number, moment in enumerate(moments):
            codes = self._attempt(folder, "lora_one", moment)
            while codes == [0] * RANKS and number == 0:  # it was over: once more, and sooner
                moment = replace(moment, seconds=SOONER * moment.seconds)
                folder = self._folder("trial")
                codes = self._attempt(folder, "lora_one", moment)
            if codes == [0] * RANKS:
                trial.killed += " (too late: it was over)"
            else:
                self._check_death(trial, codes, moment.ranks)
        self._finish(trial, folder, reference, "lora_one")
        trial.seconds = time.monotonic() - started
        return trial

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _attempt(
        self, folder: Path, method: str, kill: Point | Moment | None = None, everyone: bool = False
    ) -> list[int | None]:
        """Start the run and wait for its end.  Returns the exit codes; None: it hung."""
        point = kill if isinstance(kill, Point) else None
        started = time.monotonic()
        processes = start_commands(folder, RANKS, job, self.settings(folder / "run", method), folder, point, everyone)
        if isinstance(kill, Moment):
            time.sleep(max(0.0, started + kill.seconds - time.monotonic()))
            for rank in kill.ranks:
                processes[rank].kill()
        for process in processes:
            process.join(max(0.1, started + SECONDS - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes

    def _check_death(self, trial: Trial, codes: list[int | None], victims: Sequence[int]) -> None:
        for rank, code in enumerate(codes):
            expected = code == -signal.SIGKILL if rank in victims else code not in (None, 0)
            if not expected:
                trial.faults.append(f"killed {list(victims)}, exit codes {codes}")
                return

    def _finish(self, trial: Trial, folder: Path, reference: dict[str, Any], method: str) -> None:
        codes = self._attempt(folder, method)
        if codes != [0] * RANKS:
            trial.faults.append(f"ended with {codes}: {_stderr(folder)}")
            return
        trial.goes_on = _went_on_from(folder)
        if trial.goes_on != END and _computed(folder) != _work(trial.goes_on):
            trial.faults.append(f"from {trial.goes_on} it computed {_computed(folder)}, not {_work(trial.goes_on)}")
        found = outcome(folder / "run")
        trial.faults += [
            f"{what}: {found[what]} is not {reference[what]}" for what in found if found[what] != reference[what]
        ]


def _stderr(folder: Path) -> str:
    return " | ".join(path.read_text().strip()[-600:] for path in sorted(folder.glob("*.stderr")))


def _went_on_from(folder: Path) -> str:
    """What the last process of a run says that it found."""
    said = (folder / "0.stdout").read_text()
    if "nothing to do" in said:
        return END
    step = json.loads((folder / "run" / "run.json").read_text())["resumed_from"]
    if step is not None:
        return f"step {step}"
    return [START, FIRST_GROUP, BOTH_GROUPS][said.count(" was kept")]


def _computed(folder: Path) -> dict[str, int]:
    """Gradients of each rank and SVDs of all that the last process has computed."""
    counts = [json.loads((folder / f"{rank}.counts").read_text()) for rank in range(RANKS)]
    assert len({count["gradients"] for count in counts}) == 1, "collective"
    return {"gradients": counts[0]["gradients"], "svds": sum(count["svds"] for count in counts)}


def _work(goes_on: str) -> dict[str, int]:
    """What is left to be computed: nothing twice."""
    groups = {START: GROUPS, FIRST_GROUP: GROUPS - 1}.get(goes_on, 0)
    return {"gradients": groups * PARTS, "svds": groups * LAYERS // GROUPS * SVDS}


def outcome(out: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was killed."""
    from lora_one_dist.disk import folders

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    checkpoints = out / "checkpoints"
    return {
        "metrics.jsonl": [(line["step"], {key: line[key] for key in COMPARED if key in line}) for line in lines],
        "TensorBoard": _scalars(out / "tensorboard"),
        "adapter": _hashes(out / "adapter"),
        "initial adapter": _hashes(out / "adapter_init"),
        "checkpoints": {
            path.name: {
                name: entry["sha256"] for name, entry in folders.read_manifest(path).items() if name != "state.json"
            }
            for path in sorted(checkpoints.glob("step-*"))
        },
        "best": json.loads((checkpoints / "best.json").read_text()),
        "latest": (checkpoints / "latest").read_text(),
        "files": sorted(path.name for folder in (out, checkpoints) for path in folder.iterdir()),
    }


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in COMPARED[:4]}


# The command ----------------------------------------------------------------------------------------------------------


def random_moments(count: int, seconds: float, seed: int = 0) -> list[tuple[str, list[Moment]]]:
    """Seeded, uniform over the duration of a run; every third run is killed once more."""
    chooser = random.Random(seed)
    trials = []
    for number in range(count):
        who = [chooser.choice([(0,), (1,), (0, 1)]) for _ in range(2 if number % 3 == 2 else 1)]
        moments = [Moment(chooser.uniform(0, seconds), ranks) for ranks in who]
        trials.append((", ".join(f"at {moment.seconds:.2f} s" for moment in moments), moments))
    return trials


def planted(short: bool, only: str) -> list[tuple[str, bool]]:
    """Names of points, and whether all ranks are killed there."""
    if short:
        return list(SHORT)
    chosen = [point for point in POINTS.values() if only in point.name]
    return [(point.name, everyone) for point in chosen for everyone in (False, True) if point.both or not everyone]


def trials(harness: Harness, short: bool, only: str, moments: int) -> Iterator[Trial]:
    """At the points, then at so many random moments."""
    for name, everyone in planted(short, only):
        yield harness.at_point(POINTS[name], everyone)
    harness.reference("lora_one")
    for name, chosen in random_moments(moments, harness.seconds):
        yield harness.at_moments(name, chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=25, help="random moments")
    parser.add_argument("--short", action="store_true", help="only the points of the suite")
    parser.add_argument("--only", default="", help="only points with this in their name")
    arguments = parser.parse_args()
    began, done, bad = time.monotonic(), 0, 0
    print("| killed at | who | seconds | went on from | equal |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        for trial in trials(harness, arguments.short, arguments.only, arguments.random):
            done, bad = done + 1, bad + bool(trial.faults)
            equal = "yes" if not trial.faults else "NO: " + "; ".join(f"{fault:.300}" for fault in trial.faults)
            print(f"| {trial.name} | {trial.killed} | {trial.seconds:.1f} | {trial.goes_on} | {equal} |", flush=True)
    seconds = time.monotonic() - began
    print(f"\n{done} trials, {done - bad} equal, {seconds:.0f} s; a whole run takes {harness.seconds:.1f} s.")
    return 1 if bad else 0


if __name__ == "__main__":
    from tests import kill_harness  # by its name, under which the ranks find it

    sys.exit(kill_harness.main())
