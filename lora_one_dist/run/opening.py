"""The run folder at the start of a job: may this run use it, where did it get to, and what is said at first.

In: a config and what was read for it.  Out: a locked folder, the checkpoint to go on from, the record.  Every function
here is collective.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_one_dist.base import loading
from lora_one_dist.base.tables import Table
from lora_one_dist.base.targets import Target
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.disk import folders
from lora_one_dist.run import checkpoint, metrics
from lora_one_dist.run.inputs import Inputs, total_steps
from lora_one_dist.train.adalora import allocation_of


def refuse_used_folder(root: Path, resume: str) -> None:
    """Raise RankError on all ranks if the folder holds anything but a run to go on with."""
    with comm.all_or_none("checking the output folder"):
        if comm.rank() == 0:
            checkpoint.refuse_used_folder(root, resume)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Make the folder and keep other jobs from it for the length of the block."""
    lock = None
    with comm.all_or_none("creating the run folder"):
        if comm.rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            lock = folders.lock(root / checkpoint.LOCK)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def find(root: Path, config: Config, identity: dict[str, Any], total: int) -> tuple[checkpoint.Found | None, list[str]]:
    """As :func:`checkpoint.find`; a checkpoint beyond the ``total`` steps of the run is refused."""
    found, notes = checkpoint.find(root, config.resume, identity)
    if found is not None and found.step > total:
        raise checkpoint.CheckpointError(
            f"train.max_steps or train.epochs: the run has {total} steps, its checkpoint is at step {found.step}. "
            "Raise it, or give another output_dir."
        )
    return found, notes


def finished(root: Path, found: checkpoint.Found | None, total: int) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    summary = None
    path = root / "summary.json"
    if comm.rank() == 0 and found is not None and found.step == total and path.is_file():
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["steps"] == total:
            print(f"{root} has its {total} steps done: nothing to do. To train on, raise train.max_steps or epochs.")
        else:
            summary = None
    return comm.all_gather_object(summary)[0]


def open_record(config: Config, identity: dict[str, Any], found: checkpoint.Found | None) -> metrics.RunFolder:
    """Make the folder this run's, and see that all ranks share it."""
    root, own = Path(config.output_dir), None
    step = found.step if found is not None else None
    with comm.all_or_none("creating the run folder"):
        if comm.rank() == 0:
            own = metrics.describe_run(config, comm.launch(), checkpoint.read_run(root))
            text = json.dumps({**own, "resumed_from": step, "identity": identity}, indent=1)
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


def introduce(config: Config, read: Inputs, record: metrics.RunFolder) -> None:
    """Say what runs where, on which model and data."""
    plan, launch, hosts = read.plan, comm.launch(), comm.num_hosts()
    on = "1 host" if hosts == 1 else f"{hosts} hosts"
    how = "each rank reads its own slices" if plan.sources is not None else f"from_pretrained, as {plan.not_sliced}"
    record.say(f"{launch.world_size} ranks on {on}, {comm.device().type}, launched by {launch.source}")
    record.say(f"base {config.model.path} {config.model.dtype}, {_where_the_base_is(config)}; {how}")
    for note in plan.notes:
        record.say(note)
    if config.train.mode == "full":
        count = sum(parameter.numel() for parameter in plan.skeleton.parameters())
        record.say(f"all {count} weights are trained; each rank has masters and moments of its part")
    else:
        record.say(f"{len(plan.targets)} target layers, r {config.lora.r}, scale {config.scaling:.4g}")
    for line in [*_other_pairs(config, plan.targets), *_left_out(plan.left_out), *map(_trained_table, read.tables)]:
        record.say(line)
    allocation = allocation_of(config.lora, plan.targets, total_steps(config.train, len(read.train)))
    if allocation is not None and config.train.max_steps != 0:
        record.say(
            f"adalora keeps {allocation.target} of {allocation.initial} triplets, pruned between steps "
            f"{allocation.first} and {allocation.last}"
        )
    form, damping = config.preconditioner
    how = "no preconditioner" if damping is None else f"preconditioner {form}, damping {damping:g}"
    record.say(f"{config.optim.name}, {how}")
    for purpose, tokens in (("training", read.train), ("evaluation", read.held.tokens if read.held else None)):
        if tokens is not None:
            fill = tokens.num_tokens / (len(tokens) * config.data.max_length)
            packed = f" in {len(tokens)} packed rows, {fill:.1%} full" if len(tokens.rows) > len(tokens) else ""
            record.say(
                f"{len(tokens.rows)} {purpose} samples{packed}, {tokens.num_tokens} tokens, {tokens.num_targets} "
                f"targets; {tokens.num_truncated} cut at {config.data.max_length} tokens, "
                f"{tokens.num_without_targets} without targets dropped"
            )
            for note in tokens.notes:
                record.say(f"{purpose} data: {note}")
    positions = getattr(plan.skeleton.config, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        record.say(f"warning: data.max_length = {config.data.max_length}, but the model was made for {positions}.")


def _other_pairs(config: Config, targets: Sequence[Target]) -> list[str]:
    """The layers whose rank or scale is another than that of most, a line for each pair of them."""
    lines: dict[tuple[int, float, bool], list[Target]] = {}
    for target in targets:
        if (target.r, target.scaling) != (config.lora.r, config.scaling):
            narrow = target.r < config.lora.rank_asked(target.name)
            lines.setdefault((target.r, target.scaling, narrow), []).append(target)
    return [
        f"r {r}, scale {scaling:.4g} in {len(alike)} of them, e.g. {alike[0].name}"
        + (f": {alike[0].m} x {alike[0].n}, too narrow for r {config.lora.rank_asked(alike[0].name)}" if narrow else "")
        for (r, scaling, narrow), alike in lines.items()
    ]


def _left_out(layers: Mapping[str, str]) -> list[str]:
    """What all-linear leaves out, a line for each reason."""
    named: dict[str, list[str]] = {}
    for name, why in layers.items():
        named.setdefault(why, []).append(name)
    return [f"all-linear leaves out {len(names)}: {names[0]} {why}" for why, names in named.items()]


def _trained_table(table: Table) -> str:
    """Which rows of it are trained."""
    names, new = " and ".join(table.modules), f"{len(table.new)} new tokens, from the mean of the old"
    if table.whole:
        return f"{names}: all {table.rows} rows are trained" + (f", {new}" if table.new else "")
    return f"{names}: trained are the rows of {new}"


def _where_the_base_is(config: Config) -> str:
    if loading.is_partitioned(config.deepspeed):
        shared_by = "the ranks" if config.deepspeed.shard_group == "world" else "the ranks of each host"
        return f"partitioned over {shared_by} (ZeRO-3)"
    alone = "nobody to share it with" if config.deepspeed.stage == 3 else "stage 0"
    return f"whole on every rank ({alone})"
