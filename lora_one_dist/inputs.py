"""What a run reads before any weight, and everything that can be refused by then.

In: a :class:`Config`.  Out: :class:`Inputs`: the model's plan, the tokenizer, token data, and what tells this run from
another.  Every function here runs on every rank.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_one_dist import adapters, checkpoint, comm, data, evaluate, initialize, model, packing, sharding
from lora_one_dist.config import GRADIENT_METHODS, Config

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


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
        if config.data.packing:
            refuse_unpackable(plan.skeleton)
        if comm.rank() == 0:
            checkpoint.refuse_full_disk(Path(config.output_dir), config, plan.targets)
    with comm.all_or_none("reading the data"):
        rows = data.load_rows(config.data.train, config.data.train_split, config.data.max_train_samples)
    # Nothing may fail between the agreement and the turns: local_first is a collective of its own.
    with comm.all_or_none("tokenizing the data"):
        with comm.local_first():
            train = packing.training_data(rows, tokenizer, config.data)
        _refuse_too_few(config, len(train))
        _refuse_long_warmup(config, len(train))
    held = _read_held(config, tokenizer, rows)
    given = None
    if config.init.adapter is not None:
        with comm.all_or_none("reading the adapter"):
            given = adapters.read_adapter(Path(config.init.adapter), config, plan.targets)
    identity = _identity(config, plan, train, held.tokens if held is not None else None)
    return Inputs(plan, tokenizer, train, held, given, identity)


def _read_held(config: Config, tokenizer: Any, train_rows: Any) -> evaluate.Held | None:
    """Held-out data, if the config names any or holds any out.  Collective."""
    with comm.all_or_none("reading the evaluation data"):
        found = packing.evaluation_rows(config.data, train_rows)
    if found is None:
        return None
    rows, numbers, source = found
    with comm.all_or_none("tokenizing the evaluation data"):
        with comm.local_first():
            tokens = data.tokenize(rows, tokenizer, config.data, source, numbers)
        answered = numbers[: config.train.exact_match_samples].tolist()
        prompts = data.load_eval_prompts(rows, tokenizer, config.data, answered, source)
        evaluate.refuse_unmatched(config.train.exact_match_pattern, prompts, answered, source)
    return evaluate.Held(tokens, prompts, tokenizer)


class _AtFirstBlock(Exception):  # noqa: N818 (no error)
    """Ends a forward pass; holds what the first transformer block was given."""

    def __init__(self, given: Sequence[Any]):
        super().__init__()
        self.given = list(given)


def refuse_unpackable(skeleton: Any) -> None:
    """Raise ModelError if documents that share a row would see each other in this model.  Reads no weights.

    Its own code makes the attention mask of two documents, which must be causal within each and nothing else (flash
    attention has no mask: there the block must be given the positions).  Layers that mix tokens without a mask are
    refused by what they are: state-space and linear-attention models have convolutions or say so in their layer_types.

    Known to pass: llama, mistral, qwen2, qwen3, gemma2, gemma3, phi, phi3, gpt_neox, olmo2, granite, starcoder2 and
    smollm3.  Known to be refused: bloom and mpt (ALiBi), mamba, recurrent_gemma, lfm2 and opt.
    """
    remedy = "Set data.packing: false, or take another model."
    value = f"data.packing = true: {type(skeleton).__name__}"
    if "position_ids" not in inspect.signature(skeleton.forward).parameters:
        raise model.ModelError(f"{value} takes no position_ids, which keep packed documents apart. {remedy}")
    kinds = set(getattr(skeleton.config.get_text_config(), "layer_types", None) or ())
    mixing = sorted(kinds - PACKABLE_LAYERS)
    mixing += [name for name, layer in skeleton.named_modules() if isinstance(layer, nn.Conv1d)]
    if mixing:
        raise model.ModelError(f"{value} mixes the tokens of a row also by {mixing[0]}, across documents. {remedy}")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    try:
        given = _given_to_first_block(skeleton, positions)
    except Exception as error:  # a model's own code may fail in any way
        cause = f"{type(error).__name__}: {error}"
        raise model.ModelError(f"{value} cannot be asked for its attention mask ({cause}). {remedy}") from error
    if str(skeleton.config._attn_implementation).startswith("flash"):
        separate = any(item is positions or _equal(item, positions) for item in given)
    else:
        document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
        wanted = (document[:, None] == document).tril()
        masks = [item for item in given if isinstance(item, torch.Tensor) and item.shape[-2:] == wanted.shape]
        separate = bool(masks) and all(_equal(_allowed(mask), wanted.expand_as(mask)) for mask in masks)
    if not separate:
        raise model.ModelError(f"{value} lets packed documents see each other: its mask ignores positions. {remedy}")


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """Which pairs of tokens a mask (.., queries, keys) lets through: bool, or added to the scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _equal(value: Any, other: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == other.shape and bool(torch.equal(value, other))


def _given_to_first_block(skeleton: Any, positions: torch.Tensor) -> list[Any]:
    """What the first transformer block gets in a forward pass, which ends there."""
    stack = sharding.blocks(skeleton)
    inside = {id(parameter) for block in stack for parameter in block.parameters()}
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    inside |= {id(layer.weight) for layer in (embedding, head) if layer is not None}
    # Small: norms and tables of positions. Their values do not matter, but the meta device has none at all.
    others = {
        name: torch.zeros(parameter.shape, dtype=parameter.dtype)
        for name, parameter in skeleton.named_parameters()
        if id(parameter) not in inside
    }

    def stop(block: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        raise _AtFirstBlock([*args, *settings.values()])

    handles = [block.register_forward_pre_hook(stop, with_kwargs=True) for block in stack]
    embedded = torch.zeros(*positions.shape, embedding.weight.shape[1], dtype=embedding.weight.dtype)
    inputs = {"inputs_embeds": embedded, "position_ids": positions, "use_cache": False}
    try:
        with torch.no_grad():
            torch.func.functional_call(skeleton, others, args=(), kwargs=inputs)
    except _AtFirstBlock as reached:
        return reached.given
    finally:
        for handle in handles:
            handle.remove()
    raise model.ModelError("no transformer block was reached")


def _identity(
    config: Config, plan: model.Plan, train: data.TokenData, held_out: data.TokenData | None
) -> dict[str, Any]:
    """By rank 0, which has all of it under its eyes as the others have."""
    own = None
    with comm.all_or_none("taking fingerprints of base and data"):
        if comm.rank() == 0:
            evaluation = held_out.fingerprint() if held_out is not None else None
            base = model.fingerprint(plan.folder)
            own = checkpoint.identity(config, plan.targets, base, train.fingerprint(), evaluation)
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
            what = "packed rows" if config.data.packing else "samples"
            raise data.DataError(f"{key} = {count}: the training data has {available} {what}. Lower it or add data.")


def _refuse_long_warmup(config: Config, num_samples: int) -> None:
    total, warmup = total_steps(config, num_samples), config.optim.warmup_steps
    if 0 < total <= warmup:
        raise data.DataError(
            f"optim.warmup_steps = {warmup}: the run has {total} steps, so optim.lr would never be reached. Lower it."
        )
