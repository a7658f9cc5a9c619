"""What a run reads before any weight, and everything that can be refused by then.

In: a :class:`Config`.  Out: :class:`Inputs`: the model's plan, the tokenizer, token data, and what tells this run from
another.  Every function here runs on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one_dist import adapters, checkpoint, comm, data, evaluate, initialize, model
from lora_one_dist.config import GRADIENT_METHODS, Config


@dataclass
class Inputs:
    """What is read before any weight."""

    plan: model.Plan
    tokenizer: Any
    train: data.TokenData
    held: evaluate.Held | None
    """For evaluation, if the config names any."""
    given: initialize.Pairs | None
    identity: dict[str, Any]
    """Of the run: :func:`checkpoint.identity`."""


def read(config: Config) -> Inputs:
    """Read and check model plan, tokenizer, data, given adapter, and the room on the disk.  Collective."""
    settings = config.model
    folder = model.local_folder(settings.path, settings.trust_remote_code, settings.allow_pickle)
    with comm.all_or_none("checking the model"):
        needed = initialize.singular_vectors_needed(config.init.method, config.lora.r) if not config.init.adapter else 0
        plan = model.plan(folder, config.model, config.lora, needed)
        model.check_loadable(plan, config.deepspeed.shard_group)
        tokenizer = data.load_tokenizer(str(folder), config.model.trust_remote_code)
        model.check_tokenizer(plan.skeleton, tokenizer)
        if comm.rank() == 0:
            checkpoint.refuse_full_disk(Path(config.output_dir), config, plan.targets)
    with comm.all_or_none("reading the data"):
        rows = data.load_rows(config.data.train, config.data.train_split, config.data.max_train_samples)
    # Nothing may fail between the agreement and the turns: local_first is a collective of its own.
    with comm.all_or_none("tokenizing the data"):
        with comm.local_first():
            train = data.tokenize(rows, tokenizer, config.data, config.data.train)
        _refuse_too_few(config, len(train))
        _refuse_long_warmup(config, len(train))
    held = None
    if config.data.eval is not None:
        with comm.all_or_none("reading the evaluation data"):
            rows = data.load_rows(config.data.eval, config.data.eval_split, config.data.max_eval_samples)
        with comm.all_or_none("tokenizing the evaluation data"):
            with comm.local_first():
                tokens = data.tokenize(rows, tokenizer, config.data, config.data.eval)
            answered = range(min(config.train.exact_match_samples, len(rows)))
            prompts = data.load_eval_prompts(rows, tokenizer, config.data, answered, config.data.eval)
            evaluate.refuse_unmatched(config.train.exact_match_pattern, prompts, config.data.eval)
        held = evaluate.Held(tokens, prompts, tokenizer)
    given = None
    if config.init.adapter is not None:
        with comm.all_or_none("reading the adapter"):
            given = adapters.read_adapter(Path(config.init.adapter), config, plan.targets)
    identity = _identity(config, plan, train, held.tokens if held is not None else None)
    return Inputs(plan, tokenizer, train, held, given, identity)


def _identity(
    config: Config, plan: model.Plan, train: data.TokenData, held_out: data.TokenData | None
) -> dict[str, Any]:
    """By rank 0, which has all of it under its eyes as the others have."""
    own = None
    with comm.all_or_none("taking fingerprints of base and data"):
        if comm.rank() == 0:
            evaluation = data.fingerprint(held_out) if held_out is not None else None
            base = model.fingerprint(plan.folder)
            own = checkpoint.identity(config, plan.targets, base, data.fingerprint(train), evaluation)
    return comm.all_gather_object(own)[0]


def total_steps(config: Config, num_samples: int) -> int:
    """Optimizer steps of the whole run.  Pure."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return math.ceil((config.train.epochs or 0) * data.steps_per_epoch(num_samples, config.train.global_batch_size))


def _refuse_too_few(config: Config, available: int) -> None:
    needed = {"train.global_batch_size": config.train.global_batch_size} if config.train.max_steps != 0 else {}
    if config.init.adapter is None and config.init.method in GRADIENT_METHODS:
        needed["init.num_samples"] = config.init.num_samples
    for key, count in needed.items():
        if count > available:
            raise data.DataError(f"{key} = {count}: the training data has {available} samples. Lower it or add data.")


def _refuse_long_warmup(config: Config, num_samples: int) -> None:
    total, warmup = total_steps(config, num_samples), config.optim.warmup_steps
    if 0 < total <= warmup:
        raise data.DataError(
            f"optim.warmup_steps = {warmup}: the run has {total} steps, so optim.lr would never be reached. Lower it."
        )
