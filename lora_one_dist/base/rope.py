"""Positions: learned ones end; rotary ones may turn with a batch's longest sequence, so that a loss depends on company.

In: a model without values, and how long its samples are.  Out: nothing, or a refusal.  Pure.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_one_dist.base.skeleton import ModelError

TABLES = ("embed_positions", "position_embeddings", "positions_embed", "wpe")  # what transformers calls a table of them


def original_length(config: Any) -> tuple[int, str] | None:
    """Tokens above which the frequencies of a whole batch follow its largest position, and the rope_type; None: never.

    transformers' ``dynamic_rope_update``: longrope takes its long factors then, dynamic stretches its base (and keeps
    it for the batches after).  Other kinds of scaling are the same at every length.
    """
    config = config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    several = [value for value in given.values() if isinstance(value, dict)] or [given]  # one for each kind of layer
    found = []
    for rope in several:
        kind = str(rope.get("rope_type") or rope.get("type"))
        if kind in ("longrope", "su"):  # su: its name in the code that came with the first of them
            own = getattr(config, "original_max_position_embeddings", None)
            limit = rope.get("original_max_position_embeddings") or own or config.max_position_embeddings
            found.append((int(limit), kind))
        elif "dynamic" in kind:
            found.append((int(config.max_position_embeddings), kind))
    return min(found, default=None)


def table_length(part: Any) -> int | None:
    """Tokens for which a model, or a part of one, has a table of positions; None: none, or one that grows (FSMT's)."""
    found = [
        module.num_embeddings - getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in part.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES and not hasattr(module, "make_weight")
    ]
    return min(found, default=None)


def refuse_without_position(part: Any, tokens: int, value: str, remedy: str) -> None:
    """Raise ModelError if a sequence of so many tokens has some behind the last position; arguments as below."""
    limit = table_length(part)
    if limit is not None and tokens > limit:
        rule = f"{type(part).__name__} has a table of {limit} positions"
        raise ModelError(f"{value} has {tokens} tokens; {rule}. {remedy.format(limit)}")


def refuse_beyond(model: Any, tokens: int, value: str, remedy: str) -> None:
    """Raise ModelError if a sequence of so many tokens would change the positions of those beside it.

    Args:
        value: the setting, its value, and what is so long: "data.max_length = 64: the longest training sample".
        remedy: what to do, with {} for the length that may be had.
    """
    limit = original_length(model.config)
    if limit is not None and tokens > limit[0]:
        length, kind = limit
        raise ModelError(
            f"{value} has {tokens} tokens; above its original length of {length} {type(model).__name__} turns the "
            f"positions of a whole micro-batch by its longest sample (rope_type {kind}), so that a sample's loss would "
            f"depend on what shares its micro-batch. {remedy.format(length)}"
        )
