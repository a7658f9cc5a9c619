"""What a run reads before any weight, and everything that can be refused by then.

In: a :class:`Config`.  Out: :class:`Inputs`: the model's plan, the tokenizer, token data, and what tells this run from
another.  Every function here runs on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_one_dist.adapters import folder as adapters
from lora_one_dist.base import loading, varlen
from lora_one_dist.base.blocks import has_encoder, parts
from lora_one_dist.base.export import refuse_untrainable
from lora_one_dist.base.files import fingerprint
from lora_one_dist.base.packable import refuse_unpackable
from lora_one_dist.base.rope import refuse_beyond, refuse_without_position
from lora_one_dist.base.skeleton import ModelError, local_folder
from lora_one_dist.base.tables import Table, new_ids, plan_tables
from lora_one_dist.base.two_stacks import refuse_settings
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config, TrainConfig
from lora_one_dist.data import batches
from lora_one_dist.data.cache import writable_cache
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.packing import PackedData
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.samples import TokenData, load_eval_prompts, tokenize
from lora_one_dist.data.split import evaluation_rows, training_data
from lora_one_dist.data.tokenizer import add_tokens, load_tokenizer, saved
from lora_one_dist.initialise import pairs
from lora_one_dist.run import room
from lora_one_dist.run.day import with_day
from lora_one_dist.run.identity import identity, refuse_unlike_hosts
from lora_one_dist.train import adalora, evaluate

LIMIT_LENGTH = "Set data.max_length to {} or less."


@dataclass
class Inputs:
    """What is read before any weight."""

    plan: loading.Plan
    tokenizer: Any
    train: TokenData
    held: evaluate.Held | None
    """For evaluation, if the config names any."""
    given: adapters.Given | None
    identity: dict[str, Any]
    """Of the run: :func:`~lora_one_dist.run.identity.identity`."""
    tables: list[Table] = field(default_factory=list)
    """Embedding and head where rows of theirs are trained."""
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    """Of a tokenizer with tokens that are new to the model."""


def read(config: Config) -> Inputs:
    """Read and check model plan, tokenizer, data, given adapter, and the room on the disk.  Collective."""
    config = with_day(config)
    settings = config.model
    folder = local_folder(settings.path, settings.trust_remote_code, settings.allow_pickle)
    with comm.all_or_none("checking the model"):
        plan = _plan(config, folder)
        refuse_settings(plan.skeleton, config)
        tokenizer = load_tokenizer(str(folder), config.model.trust_remote_code)
        new = new_ids(plan.skeleton, tokenizer, add_tokens(tokenizer, config.lora.new_tokens or []))
        if new and config.train.mode == "full":
            _refuse_new_tokens(config, plan, new)
        tables = plan_tables(plan.skeleton, config.lora, plan.targets, new)
        if config.model.attn_implementation == varlen.NAME:
            varlen.refuse_cpu()
        if config.data.packing or config.model.attn_implementation == varlen.NAME:
            refuse_unpackable(plan.skeleton)
        if comm.rank() == 0:
            parameters = sum(parameter.numel() for parameter in plan.skeleton.parameters())
            room.refuse_full_disk(Path(config.output_dir), config, [*plan.targets, *tables], parameters)
    with comm.all_or_none("reading the data"), writable_cache():
        rows = load_rows(config.data.train, config.data.train_split, config.data.max_train_samples)
    # Nothing may fail between the agreement and the turns: local_first is a collective of its own.
    with comm.all_or_none("tokenizing the data"):
        with comm.local_first(), writable_cache():
            train = training_data(rows, tokenizer, config.data, **_how(plan))
        _refuse_long_samples(config, plan, train, "training")
        _refuse_too_few(config, len(train))
        _refuse_long_warmup(config, len(train))
        adalora.allocation_of(config.lora, plan.targets, total_steps(config.train, len(train)))
    held = _read_held(config, plan, tokenizer, rows)
    given = None
    if config.init.adapter is not None:
        with comm.all_or_none("reading the adapter"):
            given = adapters.read_adapter(Path(config.init.adapter), config, plan.targets, tables)
    own = _identity(config, plan, tables, train, held.tokens if held is not None else None)
    return Inputs(plan, tokenizer, train, held, given, own, tables, saved(tokenizer) if new else {})


def _plan(config: Config, folder: Path) -> loading.Plan:
    """Of the model; with targets, or such that all of it can be trained and written."""
    if config.train.mode == "full":
        plan = loading.plan(folder, config.model, None, 0)
        refuse_untrainable(plan.skeleton, config.model)
    else:
        needed = pairs.singular_vectors_needed(config.init, config.lora.r) if not config.init.adapter else 0
        plan = loading.plan(folder, config.model, config.lora, needed, config.changes_base)
    loading.check_loadable(plan, config.deepspeed.shard_group)
    return plan


def _refuse_new_tokens(config: Config, plan: loading.Plan, new: Sequence[int]) -> None:
    rows = plan.skeleton.get_input_embeddings().num_embeddings
    raise ModelError(
        f"train.mode = full: the tokenizer of {config.model.path} has {len(new)} tokens more than the model's {rows} "
        "rows. Resize the model first (resize_token_embeddings, then save_pretrained), or take its own tokenizer."
    )


def _read_held(config: Config, plan: loading.Plan, tokenizer: Any, train_rows: Any) -> evaluate.Held | None:
    """Held-out data, if the config names any or holds any out.  Collective."""
    with comm.all_or_none("reading the evaluation data"), writable_cache():
        found = evaluation_rows(config.data, train_rows)
    if found is None:
        return None
    rows, numbers, source = found
    with comm.all_or_none("tokenizing the evaluation data"):
        with comm.local_first(), writable_cache():
            tokens = tokenize(rows, tokenizer, config.data, source, numbers, **_how(plan))
        answered = numbers[: config.train.exact_match_samples].tolist()
        _refuse_long_samples(config, plan, tokens, "evaluation")
        prompts = load_eval_prompts(rows, tokenizer, config.data, answered, source, has_encoder(plan.skeleton))
        _refuse_long_answers(config, plan, prompts)
        evaluate.refuse_unmatched(config.train.exact_match_pattern, prompts, answered, source)
    return evaluate.Held(tokens, prompts, tokenizer)


def _how(plan: loading.Plan) -> dict[str, Any]:
    """To tokenise for this model, on the cores that the host's ranks leave, and tell on rank 0 how far it is."""
    say = partial(print, flush=True) if comm.rank() == 0 else None
    return {"with_encoder": has_encoder(plan.skeleton), "ranks": len(comm.here().host_ranks), "say": say}


def _identity(
    config: Config, plan: loading.Plan, tables: list[Table], train: TokenData, held_out: TokenData | None
) -> dict[str, Any]:
    """From what rank 0 has under its eyes; the first rank of every host sees that its host has the same."""
    own = None
    with comm.all_or_none("taking fingerprints of base and data"):
        if comm.is_local_first():
            evaluation = held_out.fingerprint() if held_out is not None else None
            own = {"base": fingerprint(plan.folder), "train": train.fingerprint(), "evaluation": evaluation}
    found = comm.all_gather_object(own)
    hosts = {host: held for host, held in zip(comm.here().host_of, found, strict=True) if held is not None}
    with comm.all_or_none("comparing what the hosts have read"):
        refuse_unlike_hosts(hosts)
    return identity(config, plan.targets, **found[0], tables=tables)


def total_steps(train: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run.  Pure."""
    if train.max_steps is not None:
        return train.max_steps
    return math.ceil((train.epochs or 0) * batches.steps_per_epoch(num_samples, train.global_batch_size))


def _refuse_too_few(config: Config, available: int) -> None:
    needed = {"train.global_batch_size": config.train.global_batch_size} if config.train.max_steps != 0 else {}
    starts = config.train.mode == "lora" and config.init.adapter is None
    if starts and config.init.takes_gradient:
        needed["init.num_samples"] = config.init.num_samples
    for key, count in needed.items():
        if count > available:
            what = "packed rows" if config.data.packing else "samples"
            raise DataError(f"{key} = {count}: the training data has {available} {what}. Lower it or add data.")


def _refuse_long_samples(config: Config, plan: loading.Plan, tokens: TokenData, purpose: str) -> None:
    documents = tokens.unpacked if isinstance(tokens, PackedData) else tokens
    value, longest = f"data.max_length = {config.data.max_length}: the longest {purpose} ", int(documents.lengths.max())
    refuse_beyond(plan.skeleton, longest, f"{value}sample", LIMIT_LENGTH)
    if not has_encoder(plan.skeleton):
        refuse_without_position(plan.skeleton, longest, f"{value}sample", LIMIT_LENGTH)
        return
    prompts = tokens.dataset.select_columns(["encoder_length"]).with_format("numpy")[:]["encoder_length"]
    sides = (("prompt", prompts), ("completion", tokens.lengths - prompts))
    for part, (what, lengths) in zip(parts(plan.skeleton), sides, strict=True):
        refuse_without_position(part, int(lengths.max()), value + what, LIMIT_LENGTH)


def _refuse_long_answers(config: Config, plan: loading.Plan, prompts: list[tuple[list[int], str]]) -> None:
    new = config.train.exact_match_max_new_tokens
    if prompts:
        value, longest = f"train.exact_match_max_new_tokens = {new}: ", max(len(ids) for ids, _ in prompts)
        remedy = "Lower it, or data.max_length, so that both together are {} or less."
        refuse_beyond(plan.skeleton, longest + new, f"{value}with its answer the longest prompt", remedy)
        if has_encoder(plan.skeleton):
            encoder, decoder = parts(plan.skeleton)
            refuse_without_position(encoder, longest, "the longest evaluation prompt", LIMIT_LENGTH)
            refuse_without_position(decoder, new, f"{value}an answer", "Lower it to {} or less.")
        else:
            refuse_without_position(plan.skeleton, longest + new, f"{value}with its answer the longest prompt", remedy)


def _refuse_long_warmup(config: Config, num_samples: int) -> None:
    total, warmup = total_steps(config.train, num_samples), config.optim.warmup_steps
    if 0 < total <= warmup:
        raise DataError(
            f"optim.warmup_steps = {warmup}: the run has {total} steps, so optim.lr would never be reached. Lower it."
        )
