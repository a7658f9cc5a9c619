"""Models of two stacks: an encoder that reads the prompt whole, and a decoder that writes the completion.

In: such a model.  Out: what its forward pass is given, and what of a run's settings it cannot take.  Pure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_one_dist.base.blocks import has_encoder
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.config.settings import Config
from lora_one_dist.data.batches import IGNORE_INDEX


def task_type(model: Any) -> str:
    """PEFT's name for what the model is trained on."""
    return "SEQ_2_SEQ_LM" if has_encoder(model) else "CAUSAL_LM"


def decoder_inputs(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Labels (b, l) one place to the right, as the model itself would have them, with pads for what has no label.

    Not all types of transformers say how; of those the first token is ``decoder_start_token_id``.
    """
    if not bool((labels != IGNORE_INDEX).any()):  # MBart begins with a row's last label, and finds none
        return torch.full_like(labels, pad_token(model))
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: torch.Tensor = model.prepare_decoder_input_ids_from_labels(
            labels=labels.clone()
        )  # FSMT writes to them
        return shifted
    if model.config.decoder_start_token_id is None:
        raise ValueError("decoder_start_token_id is not defined")
    known = labels.masked_fill(labels == IGNORE_INDEX, pad_token(model))
    return nn.functional.pad(known[:, :-1], (1, 0), value=model.config.decoder_start_token_id)


def whole_windows(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (b, n) and their mask, of models with an ``attention_window`` (LED) padded to whole windows.

    Such a model would do it itself, and run its embedding once more for it: on some ranks, not on others.
    """
    window = getattr(model.config, "attention_window", None) or 1
    more = -ids.shape[1] % (max(window) if isinstance(window, list) else window)
    return nn.functional.pad(ids, (0, more), value=pad_token(model)), nn.functional.pad(mask, (0, more))


def pad_token(model: Any) -> int:
    """The model's own id of padding; 0 where it names none."""
    return model.config.get_text_config().pad_token_id or 0


def refuse_settings(model: Any, config: Config) -> None:
    """Raise ModelError for settings, the model's own too, that do not fit two stacks: value, rule, remedy.

    Models of one stack pass.
    """
    if not has_encoder(model):
        return
    refuse_for_one_stack(type(model).__name__, config)
    own, in_file = model.config.to_dict(), f"model.path = {config.model.path}: its config.json has"
    for key, value in own.items():
        if "layerdrop" in key and value:
            raise ModelError(
                f"{in_file} {key} = {value}: layers would be left out at random, and all ranks must run the same. Set "
                "it to 0 there."
            )
    if own.get("attention_type") == "block_sparse":
        raise ModelError(
            f"{in_file} attention_type = block_sparse, which a short batch turns off for all that follow. Set it to "
            "original_full there."
        )


def refuse_for_one_stack(kind: str, config: Config) -> None:
    """Raise ModelError for settings that need one stack; ``kind`` is the model's name."""
    data = config.data
    needed: list[tuple[str, Any, Any]] = [
        ("data.format", data.format, "completion"),
        ("data.packing", data.packing, False),
        ("data.loss_on", data.loss_on, "completion"),
    ]
    if config.model.attn_implementation == "varlen":
        needed.append(("model.attn_implementation", "varlen", "auto"))
    for key, value, fitting in needed:
        if value != fitting:
            raise ModelError(
                f"{key} = {str(value).lower()}: {kind} has an encoder that reads prompts and a decoder "
                f"that writes completions, each alone in its row. Set {key}: {str(fitting).lower()}."
            )
