"""The story of a run: check, load, start or go on, train, write.

In: a :class:`Config`, on every rank of a launched job.  Out: the run folder.  Every function here runs on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from lora_one_dist.adapters.folder import Beside
from lora_one_dist.adapters.tables import TrainedTable, put_tables
from lora_one_dist.base import loading
from lora_one_dist.base.sharding import Base
from lora_one_dist.base.two_stacks import task_type
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.run import beginning, checkpoint, fitting, inputs, metrics, opening, training, whole
from lora_one_dist.run.saving import Saving, Trained, TrainedModel
from lora_one_dist.run.stopping import stop_if_asked
from lora_one_dist.train.evaluate import evaluate
from lora_one_dist.train.loop import GlobalBatches


def run(config: Config) -> dict[str, Any]:
    """Run a config to its end, from the newest checkpoint if there is one.

    Collective, between ``comm.init`` and ``comm.shutdown``.

    Returns:
        The summary that the run folder holds as summary.json.

    Raises:
        Stopped: on all ranks, if a signal asked for it.
    """
    if comm.rank() != 0:
        disable_progress_bars()
    root = Path(config.output_dir)
    opening.refuse_used_folder(root, config.resume)
    read = inputs.read(config)
    total = inputs.total_steps(config.train, len(read.train))
    with opening.locked(root):
        found, notes = opening.find(root, config, read.identity, total)
        done = opening.finished(root, found, total)
        if done is not None:
            return done
        record = opening.open_record(config, read.identity, found)
        store = checkpoint.Store(root, config.checkpoint, read.identity)
        store.open(found)
        opening.introduce(config, read, record)
        for note in notes:
            record.say(note)
        fitted = fitting.fit(config, read, begins=found is None)
        record.say(fitted.summary)
        summary = _from_load_to_summary(config, read, fitted, record, store, found, total)
        record.close()
    return summary


def _from_load_to_summary(
    config: Config,
    read: inputs.Inputs,
    fitted: fitting.Fit,
    record: metrics.RunFolder,
    store: checkpoint.Store,
    found: checkpoint.Found | None,
    total: int,
) -> dict[str, Any]:
    phases = metrics.Phases()
    with phases("load"):
        progress = partial(record.progress, "load, tensors")
        size, full = config.train.micro_batch_size, config.train.mode == "full"
        base = loading.load(config.model, config.deepspeed, read.plan, size, progress, trained=full)
        tables = put_tables(base, read.tables)
    held_loss, held_answers = (
        partial(evaluate, base, config, read.held, record.progress, answers) for answers in (False, True)
    )

    fitted.recompute(base, config.model, "gradient")
    trained = _start(config, read, base, tables, record, store, found, phases, held_answers)
    saving = Saving(config, record, store, trained, read.plan.targets, len(read.train))
    if found is None and not full:  # the weights as they came are no work to lose
        with phases("save step 0"):
            saved = saving.save(0, evaluated=False)
        stop_if_asked(record, saved)

    after = trained.before
    if total > 0:
        fitted.recompute(base, config.model, "step")
        comm.set_timeout(config.comm.timeout_seconds)
        batches = GlobalBatches(read.train, read.tokenizer.pad_token_id, config)
        first, evaluated = (found.step, found.state["evaluated"]) if found is not None else (0, False)
        with phases("train"):
            training.train(base, batches, saving, held_loss, fitted.shape, first, evaluated, total)
        with phases("evaluate after"):
            after = held_answers()
        record.log(total, after)
        saving.save_if_best(total, False, after.get("eval_loss", math.nan))

    summary = {"steps": total, "before": trained.before, "after": after, "phases": phases.over_ranks()}
    summary["recomputed_blocks"] = fitted.prediction.recomputed
    saving.write_results(summary)
    _conclude(config, record, summary)
    return summary


def _start(
    config: Config,
    read: inputs.Inputs,
    base: Base,
    tables: list[TrainedTable],
    record: metrics.RunFolder,
    store: checkpoint.Store,
    found: checkpoint.Found | None,
    phases: metrics.Phases,
    evaluate: Callable[[], dict[str, float]],
) -> Trained | TrainedModel:
    """What is trained, at its first step or at that of ``found``."""
    if config.train.mode == "full":
        if found is None:
            return whole.begin(config, read, base, record, phases, evaluate)
        with phases("resume"):
            return whole.go_on(config, read, base, record, found)
    beside = Beside(tables, read.tokenizer_files, task_type(read.plan.skeleton))
    if found is None:
        return beginning.begin(config, read, base, beside, record, store, phases, evaluate)
    with phases("resume"):
        return beginning.go_on(config, read, base, beside, record, found, evaluate)


def _conclude(config: Config, record: metrics.RunFolder, summary: dict[str, Any]) -> None:
    names = {"eval_loss": "held-out loss", "exact_match": "held-out exact match", "matthews": "held-out Matthews"}
    compared = [
        (names[key], summary["before"].get(key), summary["after"].get(key)) for key in names if key in summary["after"]
    ]
    what = f"{config.init.adapter or config.init.method}, r {config.lora.r}"
    title = f"{'all weights' if config.train.mode == 'full' else what}, {comm.world_size()} ranks"
    record.say(metrics.final_table(title, compared, summary["phases"]))
    written = {"report": "init_report.png", "TensorBoard log": "tensorboard"}
    written["initial adapter"] = "adapter_init"
    if config.train.max_steps != 0:
        written |= {"adapter": "adapter", "model": "model"}
    record.say("")
    for what, name in reversed(written.items()):
        if (record.root / name).exists():
            record.say(f"  {what + ':':<18}{record.root / name}")
