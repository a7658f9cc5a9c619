"""The training loop: batch, forward and backward, step.  It neither logs nor saves nor stops: whoever iterates does.

In: the base, the optimizer of its adapters, global batches.  Out: one :class:`Step` after another.  Runs on every rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lora_one_dist.base.loss import first_non_finite, loss_sum
from lora_one_dist.base.sharding import Base
from lora_one_dist.cluster import comm
from lora_one_dist.config.seeds import seed_of
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches
from lora_one_dist.data.rows import place_of
from lora_one_dist.data.samples import TokenData
from lora_one_dist.train import optim

SHOWN_SAMPLES = 4  # of those named in an error


class TrainError(RuntimeError):
    """Training cannot go on: a loss or gradient that is not finite, or nothing could be saved when asked to stop."""


@dataclass(frozen=True)
class Step:
    """An optimizer step that is done, the same on all ranks but for ``compute_seconds``."""

    number: int
    """Steps done so far, this one included."""
    loss: float
    """Mean over the target tokens of the global batch."""
    lr: float
    grad_norm: float
    """Of the raw gradient, before clipping."""
    tokens: int
    """Over all ranks, padding excluded."""
    compute_seconds: float
    """Of this rank, forward and backward."""
    stop_asked: bool
    """Has a signal asked any rank to stop?"""


@dataclass(frozen=True)
class GlobalBatches:
    """The samples of each step, as functions of the step alone, and this rank's part of them."""

    tokens: TokenData
    pad_token_id: int
    config: Config

    def samples(self, step: int) -> list[int]:
        """Of all ranks, of the step that comes after ``step`` steps."""
        train = self.config.train
        return batches.global_batch(len(self.tokens), train.global_batch_size, step, train.seed)

    def micro_batches(self, samples: Sequence[int]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """This rank's part: samples and their tensors.

        A rank without a micro-batch of its own gets no samples and a weightless copy: the collectives need every rank.
        """
        size = self.config.train.micro_batch_size
        for positions in batches.deal(len(samples), size, comm.world_size(), comm.rank()):
            rows = [self.tokens.dataset[samples[i]] for i in positions or [0]]
            yield [samples[i] for i in positions], batches.collate(rows, self.pad_token_id, weightless=not positions)


def steps(
    base: Base, optimizer: optim.LayerShardedOptimizer, batches: GlobalBatches, first: int, total: int
) -> Iterator[Step]:
    """Train from ``first`` steps on to ``total``, one step each time that the next :class:`Step` is asked for.

    Collective, each step.  Between two steps the module may be used otherwise, but must be left in train mode.

    Raises:
        TrainError: on all ranks, if a loss or gradient is not finite: naming samples and layer.  Nothing was updated.
    """
    num_targets = np.asarray(batches.tokens.dataset["num_targets"])
    for step in range(first, total):
        samples = batches.samples(step)
        began = time.monotonic()
        loss, tokens = _forward_backward(base, batches, step, samples, int(num_targets[samples].sum()))
        compute_seconds = time.monotonic() - began
        rate = optim.learning_rate(step, total, optimizer.config)
        sums = torch.tensor([loss, tokens, comm.stop_asked()], dtype=torch.float64)
        loss, tokens, asked = comm.all_sum(sums).tolist()
        try:
            if not math.isfinite(loss):
                raise TrainError(f"the loss of step {step + 1} is {loss}. Lower optim.lr.")
            norm = optimizer.step(rate)
        except (TrainError, optim.NonFiniteError) as error:
            raise TrainError(f"{error} {_explain(base, optimizer, batches, step, samples)}") from None
        yield Step(step + 1, loss, rate, norm, int(tokens), compute_seconds, bool(asked))


def _seed_dropout(config: Config, step: int) -> None:
    """Dropout is a function of seed, step and rank, so that a run that goes on needs no state of a generator."""
    torch.manual_seed(seed_of(config.train.seed, "dropout", step, comm.rank()) % 2**63)


def _forward_backward(
    base: Base, batches: GlobalBatches, step: int, samples: Sequence[int], targets: int
) -> tuple[float, int]:
    """This rank's micro-batches of one global batch.  Returns its part of the mean loss and its number of tokens."""
    loss, tokens = torch.zeros((), dtype=torch.float64, device=comm.device()), 0
    _seed_dropout(batches.config, step)
    for own, batch in batches.micro_batches(samples):
        part = loss_sum(base.module, batch, 1 / targets)
        part.backward()
        base.release()
        loss += part.detach()
        tokens += int(batch["attention_mask"].sum()) if own else 0
    return float(loss), tokens


def _explain(
    base: Base, optimizer: optim.LayerShardedOptimizer, batches: GlobalBatches, step: int, samples: Sequence[int]
) -> str:
    """Run the step once more, a micro-batch at a time, to name the samples and the layer.  Collective."""
    found = []
    optimizer.take_non_finite()
    _seed_dropout(batches.config, step)
    for own, batch in batches.micro_batches(samples):
        with first_non_finite(base.module) as first:
            loss_sum(base.module, batch).backward()
        base.release()
        where = [f"output of {name}" for name in first] + [f"gradient of {g}" for g in optimizer.take_non_finite()]
        if own and where:
            found.append(f"{where[0]} for the samples at {_places(batches, own)}")
    named = [text for texts in comm.all_gather_object(found) for text in texts]
    if not named:
        return "Each micro-batch by itself is finite."
    return f"First not finite, by micro-batch: {_first(named, '; ', '; and {} more')}."


def _places(batches: GlobalBatches, samples: Sequence[int]) -> str:
    rows = [row for sample in samples for row in batches.tokens.rows_of(sample)]
    source = batches.config.data.train
    return _first([place_of(source, row) for row in rows[:SHOWN_SAMPLES]], ", ", " and {} more", len(rows))


def _first(texts: Sequence[str], between: str, more: str, count: int | None = None) -> str:
    """The first SHOWN_SAMPLES of ``count`` texts, and how many there are beside."""
    left = (len(texts) if count is None else count) - SHOWN_SAMPLES
    return between.join(texts[:SHOWN_SAMPLES]) + (more.format(left) if left > 0 else "")
