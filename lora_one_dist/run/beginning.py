"""How a run comes to its first training step: from the pre-trained base by a method, or from a checkpoint.

In: a loaded base.  Out: :class:`~lora_one_dist.run.saving.Trained`.  Runs on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lora_one_dist.adapters import folder as adapter_files
from lora_one_dist.adapters.lora import Adapter, inject_adapters, peft_config, set_adapters, set_frozen, set_magnitudes
from lora_one_dist.adapters.tables import TrainedTable, set_rows
from lora_one_dist.base.sharding import Base
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches
from lora_one_dist.data.samples import TokenData
from lora_one_dist.initialise import gradient, pairs
from lora_one_dist.run import checkpoint, metrics
from lora_one_dist.run.inputs import Inputs, total_steps
from lora_one_dist.run.saving import Trained, guarded
from lora_one_dist.run.stopping import stop_if_asked
from lora_one_dist.train import adalora, optim

Batch = list[list[gradient.MicroBatch]]
Evaluation = Callable[[], dict[str, float]]


def begin(
    config: Config,
    read: Inputs,
    base: Base,
    beside: adapter_files.Beside,
    record: metrics.RunFolder,
    store: checkpoint.Store,
    phases: metrics.Phases,
    evaluate: Evaluation,
) -> Trained:
    """From the pre-trained base: evaluate it, initialise, set the adapters, report.  Collective.

    Raises:
        Stopped: on all ranks, if a signal asked for it between two layer groups.
        InitError: if the adapters as set contradict what the method promises.
    """
    before: dict[str, float] = {}
    if config.train.max_steps != 0:
        with phases("evaluate before"):
            before = evaluate()
        record.log(0, before)
    samples, batch = _init_batch(config, read.train, read.tokenizer.pad_token_id)
    if read.given is None:
        result = _by_layer_groups(config, read.plan.targets, base, batch, record, store, phases)
    else:
        result = pairs.Initialisation(read.given.pairs)
    with phases("set adapters"):
        adapters, losses = _set(config, read, base, result, beside.tables, batch)
    record.say("loss of the init batch: {:.6f} before, {:.6f} with the adapters set".format(*losses))
    if read.given is None:
        pairs.check_loss(*losses, config)
    initial = None
    if config.changes_base:  # as set, kept on the host of the one rank that exports
        initial = {a.target.name: (a.A.detach().cpu().clone(), a.B.detach().cpu().clone()) for a in adapters}
        initial = initial if record.writes else {}
    _report(config, read.plan.targets, record, result, losses, samples, adapters, initial, beside)
    optimizer = _optimizer(config, read, adapters, beside)
    record.say_how_loss_is_taken(base.module)
    return Trained(adapters, initial, beside, optimizer, before)


def go_on(
    config: Config,
    read: Inputs,
    base: Base,
    beside: adapter_files.Beside,
    record: metrics.RunFolder,
    found: checkpoint.Found,
    evaluate: Evaluation,
) -> Trained:
    """Adapters and optimizer as a checkpoint has them, the base changed as the initialisation changed it.  Collective.

    Raises:
        RankError: on all ranks, if one cannot read the checkpoint.
    """
    targets, before = read.plan.targets, found.state["before"]
    if not before and config.train.max_steps != 0:  # it was made to initialise only
        before = evaluate()
    with comm.all_or_none("reading the checkpoint"):
        initial = checkpoint.initial_pairs(found, config, targets)
        frozen = checkpoint.frozen_pairs(found, config, targets)
    adapters = inject_adapters(base, peft_config(config.lora, targets, config.model.path), targets, config.model.dtype)
    if initial is not None:
        set_adapters(base, adapters, initial, compensate=True)
        initial = initial if record.writes else {}
    set_frozen(adapters, frozen)
    optimizer = _optimizer(config, read, adapters, beside)
    checkpoint.load_optimizer(found.folder, optimizer, found.step)
    writers = found.state["world_size"]
    record.say(f"going on from {found.folder}, which {writers} ranks have written")
    if config.lora.dropout > 0 and writers != comm.world_size():
        record.say(f"dropout draws other masks on {comm.world_size()} ranks than on {writers}")
    return Trained(adapters, initial, beside, optimizer, before)


def _optimizer(
    config: Config, read: Inputs, adapters: list[Adapter], beside: adapter_files.Beside
) -> optim.LayerShardedOptimizer:
    allocation = adalora.allocation_of(config.lora, read.plan.targets, total_steps(config.train, len(read.train)))
    return optim.LayerShardedOptimizer(adapters, config.optim, beside.tables, allocation)


def _init_batch(config: Config, tokens: TokenData, pad_token_id: int) -> tuple[list[dict[str, Any]], Batch]:
    """The samples of the init batch, and this rank's micro-batches of it, in two parts for ``init.halves``."""
    init = config.init
    indices = batches.global_batch(len(tokens), init.num_samples, 0, config.train.seed)
    samples = [tokens.dataset[i] for i in indices]
    parts = 2 if init.halves and init.takes_gradient and len(samples) > 1 else 1
    size = config.init_micro_batch_size
    return samples, gradient.deal_micro_batches(samples, size, init.average, parts, pad_token_id)


def _by_layer_groups(
    config: Config,
    targets: Sequence[Target],
    base: Base,
    batch: Batch,
    record: metrics.RunFolder,
    store: checkpoint.Store,
    phases: metrics.Phases,
) -> pairs.Initialisation:
    """Initial pairs of all targets, a layer group after another; each that is done is kept for a later start."""
    result = pairs.Initialisation()
    for group in pairs.layer_groups(targets, config.init.layer_groups):
        part, why_not = store.load_group(group.name)
        if part is not None:
            record.say(f"layer group {group.number}/{group.count} was kept")
        else:
            if why_not is not None:
                record.say(f"warning: {why_not}")
            part = pairs.initialise_group(base, group, config, batch, record.progress, phases)
            if group.count > 1:  # one group alone is saved a moment later as step 0
                save = partial(store.save_group, group.name, part, group.owned_here)
                stop_if_asked(record, guarded(record, config.checkpoint.on_failure, save))
        result.add(part)
    return result


def _set(
    config: Config,
    read: Inputs,
    base: Base,
    result: pairs.Initialisation,
    tables: Sequence[TrainedTable],
    batch: Batch,
) -> tuple[list[Adapter], tuple[float, float]]:
    """Put the pairs into the model, and the rows that a given adapter has beside them.

    Returns the adapters, and the loss of the init batch before and after.
    """
    targets = read.plan.targets
    whole = [micro_batch for part in batch for micro_batch in part]
    before = result.loss if result.loss is not None else pairs.batch_loss(base, whole)
    adapters = inject_adapters(base, peft_config(config.lora, targets, config.model.path), targets, config.model.dtype)
    lost = set_adapters(base, adapters, result.pairs, config.changes_base)
    if read.given is not None:
        set_rows(tables, read.given.tables)
        set_magnitudes(adapters, read.given.magnitudes)
    for row in result.rows:
        row["base_rounding"] = lost.get(row["name"])
    return adapters, (before, pairs.batch_loss(base, whole))


def _report(
    config: Config,
    targets: Sequence[Target],
    record: metrics.RunFolder,
    result: pairs.Initialisation,
    losses: tuple[float, float],
    samples: Sequence[Mapping[str, Any]],
    adapters: Sequence[Adapter],
    initial: pairs.Pairs | None,
    beside: adapter_files.Beside,
) -> None:
    """Say what the initialisation found, and write it and the initial adapter.  Collective."""
    init, target_tokens = config.init, sum(sample["num_targets"] for sample in samples)
    seen = target_tokens if init.takes_gradient else 0
    for line in metrics.init_summary(result.rows, seen, config.lora.r):
        record.say(line)
    with comm.all_or_none("writing the initial adapter and its report"):
        if record.writes:
            adapter_files.export(record.root / "adapter_init", config, adapters, targets, initial, beside)
            about = {"loss_before": losses[0], "loss_after": losses[1], "target_tokens": target_tokens}
            how: dict[str, Any] = {"method": init.method}
            if init.method == "lora_ga":
                how |= {"scheme": init.scheme, "stable_output": init.stable_output}
            record.write_json("init_report.json", {**how, **about, "layers": result.rows})
            metrics.plot_report(result.rows, record.root / "init_report.png", config.lora.r)
