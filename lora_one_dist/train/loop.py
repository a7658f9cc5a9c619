"""The training loop: batch, forward and backward, step.  It neither logs nor saves nor stops: whoever iterates does.

In: the base, the optimizer of its adapters or of itself, global batches.  Out: one :class:`Step` after another.  Runs
on every rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lora_one_dist.base.loss import first_non_finite, loss_sum
from lora_one_dist.base.sharding import Base
from lora_one_dist.cluster import comm
from lora_one_dist.config.optim import OptimConfig
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
    """An optimizer step that is done, the same on all ranks."""

    number: int
    """Steps done so far, this one included."""
    loss: float
    """Mean over the target tokens of the global batch."""
    lr: float
    grad_norm: float
    """Of the raw gradient, before clipping."""
    tokens: int
    """Over all ranks, padding excluded."""
    pairs: int
    """Over all ranks, the sum of the documents' squared lengths: what attention works on, which causality halves."""
    compute_seconds: tuple[float, ...]
    """Of each rank, forward and backward."""
    stop_asked: bool
    """Has a signal asked any rank to stop?"""


class Optimizer(Protocol):
    """What the loop and checkpoints ask of the optimizer of what is trained (:mod:`optim`, :mod:`full`)."""

    config: OptimConfig
    steps: int

    def reduce(self, *carried: float) -> tuple[float, list[tuple[float, ...]]]: ...

    def update(self, lr: float, norm: float) -> None: ...

    def take_non_finite(self) -> list[str]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def resume(self, steps: int) -> None: ...


MicroBatches = list[tuple[list[int], dict[str, torch.Tensor]]]


class GlobalBatches:
    """The samples of each step, as functions of the step alone, and this rank's part of them."""

    def __init__(self, tokens: TokenData, pad_token_id: int, config: Config):
        self.tokens, self.pad_token_id, self.config = tokens, pad_token_id, config
        self.rows = tokens.dataset.with_format("numpy")  # seven times as fast as lists
        self.num_targets = np.asarray(tokens.dataset["num_targets"])
        self.pairs = tokens.squared_lengths()

    def samples(self, step: int) -> list[int]:
        """Of all ranks, of the step that comes after ``step`` steps."""
        train = self.config.train
        return batches.global_batch(len(self.tokens), train.global_batch_size, step, train.seed)

    def micro_batches(self, step: int) -> MicroBatches:
        """This rank's part: samples and their tensors.

        A rank without a micro-batch of its own gets no samples and a weightless copy: the collectives need every rank.
        """
        size, samples, made = self.config.train.micro_batch_size, self.samples(step), []
        for positions in batches.deal(len(samples), size, comm.world_size(), comm.rank()):
            rows = [self.rows[samples[i]] for i in positions or [0]]
            tensors = batches.collate(rows, self.pad_token_id, weightless=not positions)
            made.append(([samples[i] for i in positions], tensors))
        return made

    def ahead(self, first: int, total: int) -> Iterator[MicroBatches]:
        """Those of each step, made by a thread while the step before runs."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            made = pool.submit(self.micro_batches, first)
            for step in range(first, total):
                ready = made.result()
                if step + 1 < total:
                    made = pool.submit(self.micro_batches, step + 1)
                yield ready


def steps(base: Base, optimizer: Optimizer, batches: GlobalBatches, first: int, total: int) -> Iterator[Step]:
    """Train from ``first`` steps on to ``total``, one step each time that the next :class:`Step` is asked for.

    Collective, each step.  Between two steps the module may be used otherwise, but must be left in train mode.

    Raises:
        TrainError: on all ranks, if a loss or gradient is not finite: naming samples and layer.  Nothing was updated.
    """
    for step, own in enumerate(batches.ahead(first, total), start=first):
        samples = batches.samples(step)
        began = time.monotonic()
        loss = _forward_backward(base, batches, step, own, int(batches.num_targets[samples].sum()))
        rate = optim.learning_rate(step, total, optimizer.config)
        norm, rows = optimizer.reduce(loss, comm.stop_asked(), time.monotonic() - began)
        losses, asked, seconds = zip(*rows, strict=True)
        loss = sum(losses)
        try:
            if not math.isfinite(loss):
                raise TrainError(f"the loss of step {step + 1} is {loss}. Lower optim.lr.")
            optimizer.update(rate, norm)
        except (TrainError, optim.NonFiniteError) as error:
            raise TrainError(f"{error} {_explain(base, optimizer, batches, step)}") from None
        tokens, pairs = (int(counts[samples].sum()) for counts in (batches.tokens.lengths, batches.pairs))
        yield Step(step + 1, loss, rate, norm, tokens, pairs, seconds, any(asked))


def _seed_dropout(config: Config, step: int) -> None:
    """Dropout is a function of seed, step and rank, so that a run that goes on needs no state of a generator."""
    torch.manual_seed(seed_of(config.train.seed, "dropout", step, comm.rank()) % 2**63)


def _forward_backward(base: Base, batches: GlobalBatches, step: int, own: MicroBatches, targets: int) -> float:
    """This rank's micro-batches of one global batch.  Returns its part of the mean loss."""
    loss = torch.zeros((), dtype=torch.float64, device=comm.device())
    _seed_dropout(batches.config, step)
    for _, batch in own:
        part = loss_sum(base.module, batch, 1 / targets)
        part.backward()
        base.release()
        loss += part.detach()
    return float(loss)


def _explain(base: Base, optimizer: Optimizer, batches: GlobalBatches, step: int) -> str:
    """Run the step once more, a micro-batch at a time, to name the samples and the layer.  Collective."""
    found = []
    optimizer.take_non_finite()
    _seed_dropout(batches.config, step)
    for own, batch in batches.micro_batches(step):
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
