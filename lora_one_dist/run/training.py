"""The steps of a run and what is done between them: log, save, stop if asked, evaluate.

In: adapters at some step.  Out: the same adapters at the last step.  Runs on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from lora_one_dist.base.sharding import Base
from lora_one_dist.cluster import comm
from lora_one_dist.plan.seconds import needed_operations
from lora_one_dist.plan.shape import Shape
from lora_one_dist.run import metrics
from lora_one_dist.run.saving import Saving
from lora_one_dist.run.stopping import stop
from lora_one_dist.train import loop

Evaluation = Callable[[], dict[str, float]]


class _Clock:
    """Seconds, steps, tokens and pairs of tokens since it was made."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.restart()

    def restart(self) -> None:
        self.began, self.steps, self.tokens, self.pairs = time.monotonic(), 0, 0, 0

    def count(self, step: loop.Step) -> None:
        self.steps, self.tokens, self.pairs = self.steps + 1, self.tokens + step.tokens, self.pairs + step.pairs

    def read(self) -> dict[str, float]:
        """Speeds; TFLOP/s a rank of what had to be done: 4 N a token, and with attention."""
        seconds = time.monotonic() - self.began
        works = needed_operations(self.shape, self.tokens, self.pairs)
        products, whole = (work / seconds / comm.world_size() for work in works)
        values = {"tokens_per_second": self.tokens / seconds, "step_seconds": seconds / self.steps}
        values |= {"tflops": products / 1e12, "tflops_with_attention": whole / 1e12}
        peak = metrics.peak_operations()
        return values if peak is None else {**values, "mfu": products / peak}


def train(
    base: Base,
    batches: loop.GlobalBatches,
    saving: Saving,
    evaluate: Evaluation,
    shape: Shape,
    first: int,
    evaluated: bool,
    total: int,
) -> None:
    """Train from step ``first`` to ``total``.  Collective.

    A stop or a crash after a save finds the evaluation of that step still to do.

    Args:
        evaluated: is the evaluation of step ``first``, if it has one, done?

    Raises:
        Stopped: on all ranks, if a signal asked for it and the step was saved.
        TrainError: on all ranks, if a loss or gradient is not finite, or the step could not be saved.
    """
    settings, record = batches.config, saving.record
    every = settings.train.eval_steps or total

    def is_evaluated(step: int) -> bool:
        return 0 < step < total and step % every == 0

    base.module.train()
    comm.accept_stop()
    if is_evaluated(first) and not evaluated:
        _evaluate(base, saving, evaluate, first)
    clock = _Clock(shape)
    for step in _steps(base, batches, saving, first, total):
        clock.count(step)
        if step.number % settings.train.log_steps == 0 or step.number == total:
            _log(record, step, clock, total)
            clock.restart()
        due = settings.checkpoint.steps and step.number % settings.checkpoint.steps == 0
        if step.stop_asked or step.number == total or due:
            saved = saving.save(step.number, evaluated=False)
            clock.restart()
            if step.stop_asked and not saved:
                kept = f"could not be saved; the newest is {saving.store.newest}"
                raise loop.TrainError(f"asked to stop, but step {step.number} {kept}")
            if step.stop_asked:
                stop(record, f"step {step.number}")
        if is_evaluated(step.number):
            _evaluate(base, saving, evaluate, step.number)
            clock.restart()


def _steps(base: Base, batches: loop.GlobalBatches, saving: Saving, first: int, total: int) -> Iterator[loop.Step]:
    """Those of the loop; an error of theirs says from where the run can go on."""
    try:
        for step in loop.steps(base, saving.trained.optimizer, batches, first, total):
            if step.number == first + 1 > 1:  # a run that begins has said it already
                saving.record.say_how_loss_is_taken(base.module)
            yield step
    except loop.TrainError as error:
        newest = "none" if saving.store.newest is None else f"step-{saving.store.newest}"
        raise loop.TrainError(f"{error} The newest checkpoint is {newest}.") from None


def _log(record: metrics.RunFolder, step: loop.Step, clock: _Clock, total: int) -> None:
    """A line for people and one of metrics.jsonl.  Collective."""
    values = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, **clock.read()}
    left = values["step_seconds"] * (total - step.number)
    record.log(step.number, {**values, **metrics.spread_over_ranks(step.compute_seconds)})
    record.say(
        f"step {step.number}/{total}  loss {step.loss:.4f}  grad norm {step.grad_norm:.3g}  lr {step.lr:.2e}  "
        f"{values['tokens_per_second']:.0f} tokens/s  {_speed(values)}  {left:.0f} s left"
    )


def _speed(values: dict[str, float]) -> str:
    """What a rank did of what had to be done: products, with attention, and of a known GPU the share of its peak."""
    mfu = f", {values['mfu']:.0%} MFU" if "mfu" in values else ""
    return f"{values['tflops']:.3g} ({values['tflops_with_attention']:.3g}) TFLOP/s a rank{mfu}"


def _evaluate(base: Base, saving: Saving, evaluate: Evaluation, step: int) -> None:
    """Evaluate between two steps, and keep this one if it is the best.  Collective."""
    values = evaluate()
    saving.record.log(step, values)
    saving.record.say(f"step {step}  eval loss {values['eval_loss']:.4f}")
    saving.save_if_best(step, True, values["eval_loss"])
    base.module.train()
