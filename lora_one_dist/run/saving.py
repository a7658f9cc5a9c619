"""What a run writes of what it trains while it goes: checkpoints, the best of them, and the result.

In: adapters, or the model, and optimizer as they are now.  Out: files.  All of it is collective, and none of it ends a
run but an error under ``checkpoint.on_failure: stop``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from safetensors.torch import save as encode_tensors

from lora_one_dist.adapters import folder as adapter_files
from lora_one_dist.adapters.lora import Adapter
from lora_one_dist.base import export
from lora_one_dist.base.sharding import Base
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches
from lora_one_dist.disk import folders, lazy
from lora_one_dist.initialise.pairs import Pairs
from lora_one_dist.run import metrics
from lora_one_dist.run.checkpoint import Store
from lora_one_dist.run.inputs import total_steps
from lora_one_dist.train import full, optim

RETRY_SECONDS = 20.0  # until the finished adapter or model is tried to be written again


def guarded(record: metrics.RunFolder, on_failure: str, write: Callable[[], Any]) -> bool:
    """Do a collective write; False if it failed, with a warning, unless ``on_failure`` is stop.

    Raises:
        RankError: on all ranks, if it failed and ``on_failure`` is stop.
    """
    try:
        write()
    except comm.RankError as error:
        if on_failure == "stop":
            raise
        record.say(f"warning: {error}. The run goes on; older checkpoints are whole.")
        return False
    return True


@dataclass(frozen=True)
class Trained:
    """What training changes, and what the run must know of how that began.  The same on every rank, but ``initial``."""

    adapters: list[Adapter]
    initial: Pairs | None
    """A0 and B0 as set where the method changed the base, on the rank that writes; {} on the others."""
    beside: adapter_files.Beside
    optimizer: optim.LayerShardedOptimizer
    before: dict[str, float]
    """Evaluation of the base alone."""

    def files(self, saving: Saving) -> dict[str, folders.Content]:
        """What of a checkpoint is the adapter, on the rank that writes.  Not collective."""
        if not saving.record.writes:
            return {}
        found = adapter_files.encode(saving.config, self.adapters, saving.targets, self.initial, self.beside)
        return {f"adapter/{name}": content for name, content in found.items()}

    def states(self) -> folders.Content:
        """Masters and moments of this rank, as a file."""
        return encode_tensors(self.optimizer.state())

    def write(self, saving: Saving, also: Callable[[], None]) -> None:
        """The adapter alone, in place of an older one, and what is written ``also``.  Collective."""

        def work() -> None:
            if saving.record.writes:
                folder, targets = saving.record.root / "adapter", saving.targets
                adapter_files.export(folder, saving.config, self.adapters, targets, self.initial, self.beside)
            also()

        folders.on_all("writing the adapter", work, saving.config.checkpoint.timeout_seconds)


@dataclass(frozen=True)
class TrainedModel:
    """As :class:`Trained`, where every weight is trained."""

    base: Base
    beside: Mapping[str, bytes]
    """Files beside the weights, on rank 0; {} on the others."""
    optimizer: full.FullOptimizer
    before: dict[str, float]
    """Evaluation of the base before."""

    def files(self, saving: Saving) -> dict[str, folders.Content]:
        """What of a checkpoint is the model, of which each rank has a part.  Collective."""
        found = export.encode(self.base, self.beside)
        return {f"model/{name}": content for name, content in found.items()}

    def states(self) -> folders.Content:
        """Masters and moments of this rank, as a file, in pieces: they are up to six times the weights."""
        return partial(lazy.pieces, lazy.held(self.optimizer.state()))

    def write(self, saving: Saving, also: Callable[[], None]) -> None:
        """The model alone, in place of an older one, and what is written ``also``.  Collective."""
        own, seconds = export.encode(self.base, self.beside), saving.config.checkpoint.timeout_seconds
        folder = saving.record.root / "model"

        def make_room() -> None:
            if comm.rank() == 0:
                folders.clear(saving.record.root)  # of a write that was killed, at another number of ranks
                if folder.exists():
                    folders.remove(folder)

        folders.on_all("removing an older model", make_room, seconds)
        folders.write(folder, own, seconds)
        folders.on_all("writing the summary", also, seconds)


class Saving:
    """Where what one run trains is kept.  Construct and call on every rank."""

    def __init__(
        self,
        config: Config,
        record: metrics.RunFolder,
        store: Store,
        trained: Trained | TrainedModel,
        targets: Sequence[Target],
        num_samples: int,
    ):
        """
        Args:
            num_samples: of the training data, packed rows counted as one.
        """
        self.config, self.record, self.store, self.trained = config, record, store, trained
        self.targets, self.num_samples = targets, num_samples

    def save(self, step: int, evaluated: bool, best: dict[str, Any] | None = None) -> bool:
        """Save a checkpoint (the ``best``?) of now; False if that failed and the run shall go on without.

        Args:
            step: steps done.  evaluated: is their evaluation done too?
        """
        if self.store.newest == step:
            return True
        began = time.monotonic()
        files = self.trained.files(self)
        state = {**self._position(step), "evaluated": evaluated, "best": best or self.store.best}
        state |= {"before": self.trained.before, "versions": metrics.versions()}
        state["metrics_bytes"] = self.record.size_bytes()

        def write() -> None:
            size = self.store.save(step, files, self.trained.states(), state)
            seconds = time.monotonic() - began
            self.record.say(f"checkpoint step-{step} saved: {size / metrics.MIB:.1f} MiB in {seconds:.2f} s")

        guarded(self.record, self.config.checkpoint.on_failure, write)
        return self.store.newest == step

    def save_if_best(self, step: int, evaluated: bool, loss: float) -> None:
        """Keep this step's checkpoint if its evaluation's ``loss`` is the lowest so far and the best is wanted."""
        wanted = self.config.checkpoint.keep_best and self.config.train.eval_steps and self.store.is_best(loss)
        if wanted and self.save(step, evaluated, {"step": step, "eval_loss": loss}):
            guarded(self.record, self.config.checkpoint.on_failure, lambda: self.store.set_best(step, loss))

    def write_results(self, summary: dict[str, Any]) -> None:
        """The adapter or model, if trained, and the summary; tried again for a while where the disk takes them not.

        Raises:
            RankError: on all ranks, if the disk has not taken them by ``checkpoint.timeout_seconds``.
        """
        settings = self.config.checkpoint

        def summarise() -> None:
            self.record.write_json("summary.json", summary)

        tries = 1 + int(settings.timeout_seconds / RETRY_SECONDS) if settings.on_failure == "continue" else 1
        for left in reversed(range(tries)):
            try:
                if summary["steps"] > 0:
                    self.trained.write(self, summarise)
                else:
                    folders.on_all("writing the summary", summarise, settings.timeout_seconds)
                return
            except comm.RankError as error:
                if left == 0:
                    raise
                self.record.say(f"warning: {error}. Tried again in {RETRY_SECONDS:.0f} s.")
                time.sleep(RETRY_SECONDS)

    def _position(self, step: int) -> dict[str, Any]:
        """Where in the data and the schedule the run is, for people and tools: to go on, the step is enough."""
        train = self.config.train
        epoch, batch = divmod(step, batches.steps_per_epoch(self.num_samples, train.global_batch_size))
        total = total_steps(train, self.num_samples)
        return {
            "seed": train.seed,
            "position": {"epoch": epoch, "sample": batch * train.global_batch_size},
            "schedule": {"total_steps": total, "lr": optim.learning_rate(step, total, self.config.optim)},
        }
