"""What is computed again in backward instead of being kept: gradient checkpointing of the first of the frozen blocks.

In: a loaded model.  Out: the same model, set so that backward recomputes so many blocks.  Not collective.  Backward
begins with the last block and frees what was kept as it goes: the first blocks are those to recompute.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lora_one_dist.base.blocks import blocks
from lora_one_dist.base.skeleton import ModelError


def most_blocks(model: nn.Module) -> int:
    """All but the last of each stack: with it backward begins, and it would be computed again at once.  Pure.

    None of a model whose code cannot.
    """
    return max(0, len(blocks(model)) - 1) if _can(model) else 0


def refuse_kept(model: nn.Module, setting: str | int) -> None:
    """Raise ModelError if blocks are to be computed again that transformers' code always keeps.  Pure."""
    if setting not in ("auto", "none", 0) and not _can(model):
        raise ModelError(
            f"model.recompute = {setting}: {type(model).__name__} has no gradient checkpointing in transformers: "
            "none of its blocks can be computed again. Set model.recompute: none (auto does)."
        )


def _can(model: Any) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", True))


def blocks_asked(setting: str | int, most: int) -> int:
    """``model.recompute`` as a number; ``auto`` is all of them until memory is known.  Pure.

    Raises:
        ModelError: for more than ``most``.
    """
    if isinstance(setting, int) and setting > most:
        raise ModelError(f"model.recompute = {setting}: the model has {most + 1} blocks, the last is kept. Lower it.")
    return {"auto": most, "all": most, "none": 0}.get(str(setting), setting if isinstance(setting, int) else most)


def recompute_blocks(model: Any, count: int, reentrant: bool) -> None:
    """Let backward compute the first ``count`` transformer blocks again, by the kind of checkpointing named."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new names do not exist in transformers 5.17
        if count == 0:
            model.gradient_checkpointing_disable()
            return
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.disable_input_require_grads()  # transformers' hooks make leaves, begin_at_embeddings none
    block: Any
    for block in blocks(model)[count:]:
        block.gradient_checkpointing = False
