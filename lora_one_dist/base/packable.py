"""May several documents share a row of this model?  Asked of the model itself, before a weight is read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_one_dist.base import varlen
from lora_one_dist.base.blocks import blocks
from lora_one_dist.base.skeleton import ModelError

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


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
        raise ModelError(f"{value} takes no position_ids, which keep packed documents apart. {remedy}")
    kinds = set(getattr(skeleton.config.get_text_config(), "layer_types", None) or ())
    mixing = sorted(kinds - PACKABLE_LAYERS)
    mixing += [name for name, layer in skeleton.named_modules() if isinstance(layer, nn.Conv1d)]
    if mixing:
        raise ModelError(f"{value} mixes the tokens of a row also by {mixing[0]}, across documents. {remedy}")
    if skeleton.config._attn_implementation == varlen.NAME:
        return  # documents are told apart by their bounds; a model that does not hand them down is refused there
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    try:
        given = _given_to_first_block(skeleton, positions)
    except Exception as error:  # a model's own code may fail in any way
        cause = f"{type(error).__name__}: {error}"
        raise ModelError(f"{value} cannot be asked for its attention mask ({cause}). {remedy}") from error
    if str(skeleton.config._attn_implementation).startswith("flash"):
        separate = any(item is positions or _equal(item, positions) for item in given)
    else:
        document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
        wanted = (document[:, None] == document).tril()
        masks = [item for item in given if isinstance(item, torch.Tensor) and item.shape[-2:] == wanted.shape]
        separate = bool(masks) and all(_equal(_allowed(mask), wanted.expand_as(mask)) for mask in masks)
    if not separate:
        raise ModelError(f"{value} lets packed documents see each other: its mask ignores positions. {remedy}")


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """Which pairs of tokens a mask (.., queries, keys) lets through: bool, or added to the scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _equal(value: Any, other: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == other.shape and bool(torch.equal(value, other))


def _given_to_first_block(skeleton: Any, positions: torch.Tensor) -> list[Any]:
    """What the first transformer block gets in a forward pass, which ends there."""
    stack = blocks(skeleton)
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
    raise ModelError("no transformer block was reached")
