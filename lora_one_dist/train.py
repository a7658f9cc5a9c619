"""The story of a run: check, load, initialise or go on, train, write.

In: a :class:`Config`, on every rank of a launched job.  Out: the run folder.  Every function here runs on every rank.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars

from lora_one_dist import adapters as adapter_files
from lora_one_dist import (
    checkpoint,
    comm,
    data,
    evaluate,
    folders,
    gradient,
    initialize,
    inputs,
    metrics,
    model,
    optim,
    spectral,
)
from lora_one_dist.config import GRADIENT_METHODS, Config
from lora_one_dist.inputs import Inputs
from lora_one_dist.sharding import Base

RETRY_SECONDS = 20.0  # until the finished adapter is tried to be written again
SHOWN_SAMPLES = 4  # of those named in an error


class TrainError(RuntimeError):
    """Training cannot go on: a loss or gradient that is not finite, or nothing could be saved when asked to stop."""


class Stopped(Exception):  # noqa: N818 (no error)
    """The job was asked to stop, has saved what it has done, and goes on when it is started again."""


@dataclass
class _Job:
    """What every part of the story uses."""

    config: Config
    read: Inputs
    record: metrics.RunFolder
    store: checkpoint.Store
    base: Base


@dataclass
class _Progress:
    """What training changes, and where it is."""

    adapters: list[model.Adapter]
    initial: initialize.Pairs | None
    """A0 and B0 as set where the method changed the base, on the rank that writes; {} on the others."""
    optimizer: optim.LayerShardedOptimizer
    before: dict[str, Any]
    """Evaluation of the base alone."""
    step: int
    evaluated: bool = False
    """Was this step's evaluation done?"""


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
    with comm.all_or_none("checking the output folder"):
        if comm.rank() == 0:
            checkpoint.refuse_used_folder(root, config.resume)
    read = inputs.read(config)
    total = inputs.total_steps(config, len(read.train))
    lock = None
    with comm.all_or_none("creating the run folder"):
        if comm.rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            lock = folders.lock(root / checkpoint.LOCK)
    found, notes = checkpoint.find(root, config.resume, read.identity)
    _refuse_shorter(found, total)
    done = _finished(root, found, total)
    if done is not None:
        return done
    record = _open_record(config, read, found)
    store = checkpoint.Store(root, config.checkpoint, read.identity)
    store.open(found)
    _introduce(config, read, record)
    for note in notes:
        record.say(note)

    phases = metrics.Phases()
    with phases("load"):
        progress = partial(record.progress, "load, tensors")
        base = model.load(config.model, config.deepspeed, read.plan, config.train.micro_batch_size, progress)
    job = _Job(config, read, record, store, base)
    if found is None:
        now = _start(job, phases)
    else:
        with phases("resume"):
            now = _resume(job, found)
    after = now.before
    if total > 0:
        comm.set_timeout(config.comm.timeout_seconds)
        with phases("train"):
            _train(job, now, total)
        with phases("evaluate after"):
            after = _evaluate(job, answers=True)
        record.log(total, after)
        _note_eval(job, now, after)
    summary = {"steps": total, "before": now.before, "after": after, "phases": phases.over_ranks()}
    _write_results(job, now, summary)
    _conclude(job, summary)
    record.close()
    if lock is not None:
        lock.close()
    return summary


def _refuse_shorter(found: checkpoint.Found | None, total: int) -> None:
    if found is not None and found.step > total:
        raise checkpoint.CheckpointError(
            f"train.max_steps or train.epochs: the run has {total} steps, its checkpoint is at step {found.step}. "
            "Raise it, or give another output_dir."
        )


def _finished(root: Path, found: checkpoint.Found | None, total: int) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do.  Collective."""
    summary = None
    path = root / "summary.json"
    if comm.rank() == 0 and found is not None and found.step == total and path.is_file():
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["steps"] == total:
            print(f"{root} has its {total} steps done: nothing to do. To train on, raise train.max_steps or epochs.")
        else:
            summary = None
    return comm.all_gather_object(summary)[0]


def _open_record(config: Config, read: Inputs, found: checkpoint.Found | None) -> metrics.RunFolder:
    """Make the folder this run's, and see that all ranks share it.  Collective."""
    root, own = Path(config.output_dir), None
    step = found.step if found is not None else None
    with comm.all_or_none("creating the run folder"):
        if comm.rank() == 0:
            own = metrics.describe_run(config, comm.launch(), checkpoint.read_run(root))
            text = json.dumps({**own, "resumed_from": step, "identity": read.identity}, indent=1)
            folders.replace_file(root / checkpoint.RUN, text + "\n")
            folders.replace_file(root / "config.yaml", config.to_yaml())
    token = comm.all_gather_object(own)[0]["id"]
    with comm.all_or_none("looking for the run folder"):
        metrics.refuse_unshared(root / checkpoint.RUN, token)
    with comm.all_or_none("opening the run folder"):
        keeps = found is not None and found.folder.parent == root / "checkpoints"
        return metrics.RunFolder(
            root,
            writes=comm.rank() == 0,
            step=step,
            keep_bytes=found.state["metrics_bytes"] if found is not None and keeps else 0,
            stop_on_failure=config.checkpoint.on_failure == "stop",
        )


def _introduce(config: Config, read: Inputs, record: metrics.RunFolder) -> None:
    plan, train = read.plan, read.train
    shared_by = "the ranks" if config.deepspeed.shard_group == "world" else "the ranks of each host"
    where = f"partitioned over {shared_by} (ZeRO-3)"
    if not model.is_partitioned(config.deepspeed):
        alone = "nobody to share it with" if config.deepspeed.stage == 3 else "stage 0"
        where = f"whole on every rank ({alone})"
    how = "each rank reads its own slices" if plan.sources is not None else "from_pretrained: tensor names differ"
    launch, hosts = comm.launch(), comm.num_hosts()
    on = "1 host" if hosts == 1 else f"{hosts} hosts"
    record.say(f"{launch.world_size} ranks on {on}, {comm.device().type}, launched by {launch.source}")
    record.say(f"base {config.model.path} {config.model.dtype}, {where}; {how}")
    record.say(f"{len(plan.targets)} target layers, r {config.lora.r}, scale {config.scaling:.4g}")
    for purpose, tokens in (("training", train), ("evaluation", read.held.tokens if read.held is not None else None)):
        if tokens is not None:
            fill = tokens.num_tokens / (len(tokens) * config.data.max_length)
            packed = f" in {len(tokens)} packed rows, {fill:.1%} full" if len(tokens.rows) > len(tokens) else ""
            record.say(
                f"{len(tokens.rows)} {purpose} samples{packed}, {tokens.num_tokens} tokens, {tokens.num_targets} "
                f"targets; {tokens.num_truncated} cut at {config.data.max_length} tokens, "
                f"{tokens.num_without_targets} without targets dropped"
            )
    positions = getattr(plan.skeleton.config, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        record.say(f"warning: data.max_length = {config.data.max_length}, but the model was made for {positions}.")


def _start(job: _Job, phases: metrics.Phases) -> _Progress:
    """From the pre-trained base to step 0, which is saved."""
    config, record = job.config, job.record
    before: dict[str, Any] = {}
    if config.train.max_steps != 0:
        with phases("evaluate before"):
            before = _evaluate(job, answers=True)
        record.log(0, before)
    adapters, initial = _initialise(job, phases)
    now = _Progress(adapters, initial, optim.LayerShardedOptimizer(adapters, config.optim), before, 0)
    with phases("save step 0"):
        saved = _save(job, now)
    _stop_if_asked(job, saved)
    return now


def _resume(job: _Job, found: checkpoint.Found) -> _Progress:
    """Adapters and optimizer as a checkpoint has them, the base changed as the initialisation changed it."""
    base, config, read, record = job.base, job.config, job.read, job.record
    targets, before = read.plan.targets, found.state["before"]
    if not before and config.train.max_steps != 0:  # it was made to initialise only
        before = _evaluate(job, answers=True)
    with comm.all_or_none("reading the checkpoint"):
        initial = checkpoint.initial_pairs(found, config, targets)
    adapters = model.inject_adapters(
        base, model.peft_config(config.lora, targets, config.model.path), targets, config.model.dtype
    )
    if initial is not None:
        initialize.set_adapters(base, adapters, initial, config.scaling, compensate=True)
        initial = initial if record.writes else {}
    optimizer = optim.LayerShardedOptimizer(adapters, config.optim)
    checkpoint.load_optimizer(found.folder, optimizer, found.step)
    writers = found.state["world_size"]
    record.say(f"going on from {found.folder}, which {writers} ranks have written")
    if config.lora.dropout > 0 and writers != comm.world_size():
        record.say(f"dropout draws other masks on {comm.world_size()} ranks than on {writers}")
    return _Progress(adapters, initial, optimizer, before, found.step, found.state["evaluated"])


class _Groups:
    """Layer groups of the initialisation, kept in a run's checkpoints: :class:`initialize.Kept`."""

    def __init__(self, job: _Job):
        self.job = job

    def load(self, number: int, groups: int) -> initialize.Initialisation | None:
        part, why_not = self.job.store.load_group(f"init-{number}-of-{groups}")
        if part is not None:
            self.job.record.say(f"layer group {number}/{groups} was kept")
        elif why_not is not None:
            self.job.record.say(f"warning: {why_not}")
        return part

    def save(self, number: int, groups: int, part: initialize.Initialisation, owned: set[str]) -> None:
        if groups > 1:  # one group alone is saved a moment later as step 0
            name = f"init-{number}-of-{groups}"
            saved = _guard(self.job, lambda: self.job.store.save_group(name, part, owned))
            _stop_if_asked(self.job, saved)


def _stop_if_asked(job: _Job, saved: bool) -> None:
    """At a point where nothing is lost.  Collective.

    Not if this start has saved nothing: it would stop again at the same point, and again.
    """
    if any(comm.all_gather_floats(float(comm.stop_asked()))):
        if not saved:
            raise TrainError("asked to stop, but the initialisation so far could not be saved")
        _stop(job, "with the initialisation so far")


def _stop(job: _Job, saved: str) -> None:
    job.record.say(f"stopped as asked, {saved} saved; the same command goes on from there")
    job.record.close()
    raise Stopped


def _initialise(job: _Job, phases: metrics.Phases) -> tuple[list[model.Adapter], initialize.Pairs | None]:
    """Adapters set and checked; and A0, B0 as set where the method changed the base."""
    base, config, read, record = job.base, job.config, job.read, job.record
    method, targets = config.init.method, read.plan.targets
    indices = data.global_batch(len(read.train), config.init.num_samples, 0, config.train.seed)
    samples = [read.train.dataset[i] for i in indices]
    parts = 2 if config.init.halves and method in GRADIENT_METHODS and len(samples) > 1 else 1
    size, pad = config.train.micro_batch_size, read.tokenizer.pad_token_id
    batch = gradient.deal_micro_batches(samples, size, config.init.average, parts, pad)
    if read.given is None:
        result = initialize.initial_pairs(base, targets, config, batch, record.progress, phases, _Groups(job))
    else:
        result = initialize.Initialisation(read.given)
    whole = [micro_batch for part in batch for micro_batch in part]
    with phases("set adapters"):
        before = result.loss if result.loss is not None else initialize.batch_loss(base, whole)
        description = model.peft_config(config.lora, targets, config.model.path)
        adapters = model.inject_adapters(base, description, targets, config.model.dtype)
        compensates = checkpoint.compensated(config)
        lost = initialize.set_adapters(base, adapters, result.pairs, config.scaling, compensates)
        after = initialize.batch_loss(base, whole)
    record.say(f"loss of the init batch: {before:.6f} before, {after:.6f} with the adapters set")
    if read.given is None:
        initialize.check_loss(before, after, config)
    for row in result.rows:
        row["base_rounding"] = lost.get(row["name"])
    targets_seen = sum(sample["num_targets"] for sample in samples)
    tokens = targets_seen if method in GRADIENT_METHODS else 0  # pissa takes no gradient
    for line in metrics.init_summary(result.rows, tokens, config.lora.r):
        record.say(line)
    initial = None  # as set, kept on the host of the one rank that exports
    if compensates:
        initial = {a.target.name: (a.A.detach().cpu().clone(), a.B.detach().cpu().clone()) for a in adapters}
        initial = initial if record.writes else {}
    with comm.all_or_none("writing the initial adapter and its report"):
        if record.writes:
            adapter_files.export(record.root / "adapter_init", config, adapters, targets, initial)
            loss = {"loss_before": before, "loss_after": after, "target_tokens": targets_seen}
            record.write_json("init_report.json", {"method": method, **loss, "layers": result.rows})
            metrics.plot_report(result.rows, record.root / "init_report.png", config.lora.r)
    return adapters, initial


def _train(job: _Job, now: _Progress, total: int) -> None:
    """The loop: evaluate, batch, forward and backward, step, log, save.

    A stop or a crash after the save finds the evaluation of that step still to do.
    """
    config, read, record = job.config, job.read, job.record
    train, size = config.train, config.train.global_batch_size
    num_targets = np.asarray(read.train.dataset["num_targets"])
    job.base.module.train()
    comm.accept_stop()
    clock = _Clock()
    for step in range(now.step, total):
        if train.eval_steps and step > 0 and step % train.eval_steps == 0 and not now.evaluated:
            _evaluate_between(job, now)
            clock = _Clock()
        indices = data.global_batch(len(read.train), size, step, train.seed)
        began = time.monotonic()
        loss, tokens = _forward_backward(job, step, indices, int(num_targets[indices].sum()))
        compute_seconds = time.monotonic() - began
        rate = optim.learning_rate(step, total, config.optim)
        sums = torch.tensor([loss, tokens, comm.stop_asked()], dtype=torch.float64)
        loss, tokens, asked = comm.all_sum(sums).tolist()
        try:
            if not math.isfinite(loss):
                raise TrainError(f"the loss of step {step + 1} is {loss}. Lower optim.lr.")
            norm = now.optimizer.step(rate)
        except (TrainError, optim.NonFiniteError) as error:
            raise TrainError(f"{error} {_explain(job, now, step, indices)}") from None
        now.step, now.evaluated = step + 1, False
        clock.count(tokens)
        if now.step % train.log_steps == 0 or now.step == total:
            values = {"loss": loss, "lr": rate, "grad_norm": norm, **clock.read(), **_rank_spread(compute_seconds)}
            record.log(now.step, values)
            record.say(
                f"step {now.step}/{total}  loss {loss:.4f}  grad norm {norm:.3g}  lr {rate:.2e}  "
                f"{values['tokens_per_second']:.0f} tokens/s  {values['step_seconds'] * (total - now.step):.0f} s left"
            )
            clock = _Clock()
        every = config.checkpoint.steps
        if asked or now.step == total or (every and now.step % every == 0):
            saved = _save(job, now)
            clock = _Clock()
            if asked and not saved:
                raise TrainError(
                    f"asked to stop, but step {now.step} could not be saved; the newest is {job.store.newest}"
                )
            if asked:
                _stop(job, f"step {now.step}")


class _Clock:
    """Seconds, steps and tokens since it was made."""

    def __init__(self) -> None:
        self.began, self.steps, self.tokens = time.monotonic(), 0, 0.0

    def count(self, tokens: float) -> None:
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def read(self) -> dict[str, float]:
        seconds = time.monotonic() - self.began
        return {"tokens_per_second": self.tokens / seconds, "step_seconds": seconds / self.steps}


def _micro_batches(job: _Job, indices: Sequence[int]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """This rank's part of a global batch: samples and their tensors.

    A rank without a micro-batch of its own gets no samples and a weightless copy: the collectives need every rank.
    """
    config, read = job.config, job.read
    size, pad = config.train.micro_batch_size, read.tokenizer.pad_token_id
    for positions in data.deal(len(indices), size, comm.world_size(), comm.rank()):
        samples = [read.train.dataset[indices[i]] for i in positions or [0]]
        yield [indices[i] for i in positions], data.collate(samples, pad, weightless=not positions)


def _seed_dropout(job: _Job, step: int) -> None:
    """Dropout is a function of seed, step and rank, so that a run that goes on needs no state of a generator."""
    torch.manual_seed(spectral.seed_of(job.config.train.seed, "dropout", step, comm.rank()) % 2**63)


def _forward_backward(job: _Job, step: int, indices: Sequence[int], targets: int) -> tuple[float, int]:
    """This rank's micro-batches of one global batch.  Returns its part of the mean loss and its number of tokens."""
    loss, tokens = torch.zeros((), dtype=torch.float64, device=comm.device()), 0
    _seed_dropout(job, step)
    for samples, batch in _micro_batches(job, indices):
        part = model.loss_sum(job.base.module, batch, 1 / targets)
        part.backward()
        job.base.release()
        loss += part.detach()
        tokens += int(batch["attention_mask"].sum()) if samples else 0
    return float(loss), tokens


def _explain(job: _Job, now: _Progress, step: int, indices: Sequence[int]) -> str:
    """Run the step once more, a micro-batch at a time, to name the samples and the layer.  Collective."""
    base, config, read = job.base, job.config, job.read
    found = []
    now.optimizer.take_non_finite()
    _seed_dropout(job, step)
    for samples, batch in _micro_batches(job, indices):
        with model.first_non_finite(base.module) as first:
            model.loss_sum(base.module, batch).backward()
        base.release()
        where = [f"output of {name}" for name in first] + [f"gradient of {g}" for g in now.optimizer.take_non_finite()]
        if samples and where:
            rows = [row for i in samples for row in read.train.rows_of(i)]
            places = ", ".join(data.place_of(config.data.train, row) for row in rows[:SHOWN_SAMPLES])
            others = f" and {len(rows) - SHOWN_SAMPLES} more" if len(rows) > SHOWN_SAMPLES else ""
            found.append(f"{where[0]} for the samples at {places}{others}")
    named = [text for texts in comm.all_gather_object(found) for text in texts]
    newest = "none" if job.store.newest is None else f"step-{job.store.newest}"
    if not named:
        return f"Each micro-batch by itself is finite. The newest checkpoint is {newest}."
    more = f"; and {len(named) - SHOWN_SAMPLES} more" if len(named) > SHOWN_SAMPLES else ""
    shown = "; ".join(named[:SHOWN_SAMPLES])
    return f"First not finite, by micro-batch: {shown}{more}. The newest checkpoint is {newest}."


def _rank_spread(compute_seconds: float) -> dict[str, Any]:
    """Slowest and fastest rank of the last step, and the largest memory.  Collective."""
    seconds = comm.all_gather_floats(compute_seconds)
    slowest, fastest = max(seconds), min(seconds)
    return {
        "slowest_rank": seconds.index(slowest),
        "slowest_rank_seconds": slowest,
        "fastest_rank": seconds.index(fastest),
        "fastest_rank_seconds": fastest,
        "peak_bytes": int(max(comm.all_gather_floats(metrics.peak_bytes()))),
    }


def _evaluate(job: _Job, answers: bool) -> dict[str, float]:
    """Held-out loss and, with ``answers``, exact match; nothing without held-out data.  Collective."""
    held = job.read.held
    return {} if held is None else evaluate.evaluate(job.base, job.config, held, job.record.progress, answers)


def _evaluate_between(job: _Job, now: _Progress) -> None:
    """Evaluate at this step, and keep it if it is the best.  Collective."""
    values = _evaluate(job, answers=False)
    now.evaluated = True
    job.record.log(now.step, values)
    job.record.say(f"step {now.step}  eval loss {values['eval_loss']:.4f}")
    _note_eval(job, now, values)
    job.base.module.train()


def _note_eval(job: _Job, now: _Progress, values: dict[str, float]) -> None:
    """Keep the best checkpoint.  Collective."""
    config, store = job.config, job.store
    loss = values.get("eval_loss", math.nan)
    wanted = config.checkpoint.keep_best and config.train.eval_steps and store.is_best(loss)
    if wanted and _save(job, now, {"step": now.step, "eval_loss": loss}):
        _guard(job, lambda: store.set_best(now.step, loss))


def _save(job: _Job, now: _Progress, best: dict[str, Any] | None = None) -> bool:
    """Save a checkpoint of now (the ``best``?); False if that failed and the run shall go on without.  Collective."""
    config, read, record = job.config, job.read, job.record
    if job.store.newest == now.step:
        return True
    began = time.monotonic()
    targets, samples = read.plan.targets, len(read.train)
    files = adapter_files.encode(config, now.adapters, targets, now.initial) if record.writes else {}
    epoch, batch = divmod(now.step, data.steps_per_epoch(samples, config.train.global_batch_size))
    total = inputs.total_steps(config, samples)
    state = {
        "seed": config.train.seed,
        "position": {"epoch": epoch, "sample": batch * config.train.global_batch_size},
        "schedule": {"total_steps": total, "lr": optim.learning_rate(now.step, total, config.optim)},
        "before": now.before,
        "evaluated": now.evaluated,
        "best": best or job.store.best,
        "metrics_bytes": record.size_bytes(),
        "versions": metrics.versions(),
    }

    def save() -> None:
        size = job.store.save(now.step, files, now.optimizer, state)
        seconds = time.monotonic() - began
        record.say(f"checkpoint step-{now.step} saved: {size / metrics.MIB:.1f} MiB in {seconds:.2f} s")

    _guard(job, save)
    return job.store.newest == now.step


def _guard(job: _Job, write: Callable[[], None]) -> bool:
    """Do a collective write; False if it failed, with a warning, unless ``checkpoint.on_failure`` is stop."""
    config, record = job.config, job.record
    try:
        write()
    except comm.RankError as error:
        if config.checkpoint.on_failure == "stop":
            raise
        record.say(f"warning: {error}. The run goes on; older checkpoints are whole.")
        return False
    return True


def _write_results(job: _Job, now: _Progress, summary: dict[str, Any]) -> None:
    """The adapter and the summary; tried again for a while where the disk does not take them.  Collective."""
    config, record = job.config, job.record

    def write() -> None:
        if record.writes and now.step > 0:
            targets = job.read.plan.targets
            adapter_files.export(record.root / "adapter", config, now.adapters, targets, now.initial)
        record.write_json("summary.json", summary)

    seconds = config.checkpoint.timeout_seconds
    tries = 1 + int(seconds / RETRY_SECONDS) if config.checkpoint.on_failure == "continue" else 1
    for left in reversed(range(tries)):
        try:
            folders.on_all("writing the adapter", write, seconds)
            return
        except comm.RankError as error:
            if left == 0:
                raise
            record.say(f"warning: {error}. Tried again in {RETRY_SECONDS:.0f} s.")
            time.sleep(RETRY_SECONDS)


def _conclude(job: _Job, summary: dict[str, Any]) -> None:
    config, record = job.config, job.record
    names = {"eval_loss": "held-out loss", "exact_match": "held-out exact match"}
    compared = [
        (names[key], summary["before"].get(key), summary["after"].get(key)) for key in names if key in summary["after"]
    ]
    title = f"{config.init.adapter or config.init.method}, r {config.lora.r}, {comm.world_size()} ranks"
    record.say(metrics.final_table(title, compared, summary["phases"]))
    written = {"report": "init_report.png", "TensorBoard log": "tensorboard"}
    written["initial adapter"] = "adapter_init"
    if config.train.max_steps != 0:
        written["adapter"] = "adapter"
    record.say("")
    for what, name in reversed(written.items()):
        if (record.root / name).exists():
            record.say(f"  {what + ':':<18}{record.root / name}")
