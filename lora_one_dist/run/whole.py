"""How a run that trains every weight comes to its first step: as the base is, or from a checkpoint.

In: a loaded base.  Out: :class:`~lora_one_dist.run.saving.TrainedModel`.  Runs on every rank; in the place of
:mod:`beginning`, which starts adapters.
"""

from __future__ import annotations

from lora_one_dist.base import export
from lora_one_dist.base.sharding import Base
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.run import checkpoint, metrics
from lora_one_dist.run.beginning import Evaluation
from lora_one_dist.run.inputs import Inputs
from lora_one_dist.run.saving import TrainedModel
from lora_one_dist.train.full import FullOptimizer


def begin(
    config: Config,
    read: Inputs,
    base: Base,
    record: metrics.RunFolder,
    phases: metrics.Phases,
    evaluate: Evaluation,
) -> TrainedModel:
    """From the pre-trained base: evaluate it.  Collective."""
    with phases("evaluate before"):
        before = evaluate()
    record.log(0, before)
    record.say_how_loss_is_taken(base.module)
    return _trained(config, read, base, before)


def go_on(
    config: Config,
    read: Inputs,
    base: Base,
    record: metrics.RunFolder,
    found: checkpoint.Found,
) -> TrainedModel:
    """Weights and optimizer as a checkpoint has them.  Collective.

    Raises:
        RankError: on all ranks, if one cannot read the checkpoint.
    """
    trained = _trained(config, read, base, found.state["before"])
    checkpoint.load_optimizer(found.folder, trained.optimizer, found.step)
    record.say(f"going on from {found.folder}, which {found.state['world_size']} ranks have written")
    return trained


def _trained(config: Config, read: Inputs, base: Base, before: dict[str, float]) -> TrainedModel:
    with comm.all_or_none("reading what stands beside the weights"):
        beside = export.beside(read.plan.folder, config.model.dtype) if comm.rank() == 0 else {}
    return TrainedModel(base, beside, FullOptimizer(base, config.optim), before)
