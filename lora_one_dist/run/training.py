"""The steps of a run and what is done between them: log, save, stop if asked, evaluate.

In: adapters at some step.  Out: the same adapters at the last step.  Runs on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from lora_one_dist.base.sharding import Base
from lora_one_dist.cluster import comm
from lora_one_dist.run import metrics
from lora_one_dist.run.saving import Saving
from lora_one_dist.run.stopping import stop
from lora_one_dist.train import loop

Evaluation = Callable[[], dict[str, float]]


class _Clock:
    """Seconds, steps and tokens since it was made."""

    def __init__(self) -> None:
        self.began, self.steps, self.tokens = time.monotonic(), 0, 0

    def count(self, tokens: int) -> None:
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens

    def read(self) -> dict[str, float]:
        seconds = time.monotonic() - self.began
        return {"tokens_per_second": self.tokens / seconds, "step_seconds": seconds / self.steps}


def train(
    base: Base,
    batches: loop.GlobalBatches,
    saving: Saving,
    evaluate: Evaluation,
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

    def is_evaluated(step: int) -> bool:
        every = settings.train.eval_steps
        return every > 0 and 0 < step < total and step % every == 0

    base.module.train()
    comm.accept_stop()
    if is_evaluated(first) and not evaluated:
        _evaluate(base, saving, evaluate, first)
    clock = _Clock()
    for step in _steps(base, batches, saving, first, total):
        clock.count(step.tokens)
        if step.number % settings.train.log_steps == 0 or step.number == total:
            _log(record, step, clock, total)
            clock = _Clock()
        every = settings.checkpoint.steps
        if step.stop_asked or step.number == total or (every and step.number % every == 0):
            saved = saving.save(step.number, evaluated=False)
            clock = _Clock()
            if step.stop_asked and not saved:
                newest = saving.store.newest
                raise loop.TrainError(
                    f"asked to stop, but step {step.number} could not be saved; the newest is {newest}"
                )
            if step.stop_asked:
                stop(record, f"step {step.number}")
        if is_evaluated(step.number):
            _evaluate(base, saving, evaluate, step.number)
            clock = _Clock()


def _steps(base: Base, batches: loop.GlobalBatches, saving: Saving, first: int, total: int) -> Iterator[loop.Step]:
    """Those of the loop; an error of theirs says from where the run can go on."""
    try:
        yield from loop.steps(base, saving.trained.optimizer, batches, first, total)
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
        f"{values['tokens_per_second']:.0f} tokens/s  {left:.0f} s left"
    )


def _evaluate(base: Base, saving: Saving, evaluate: Evaluation, step: int) -> None:
    """Evaluate between two steps, and keep this one if it is the best.  Collective."""
    values = evaluate()
    saving.record.log(step, values)
    saving.record.say(f"step {step}  eval loss {values['eval_loss']:.4f}")
    saving.save_if_best(step, True, values["eval_loss"])
    base.module.train()
