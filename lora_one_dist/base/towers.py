"""Models that see and hear: their language model is trained on text, under the whole model's names.

In: a config.json, or a whole model.  Out: its class, or the model without what no text reaches.  Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lora_one_dist.base import probe


def auto_class(kind: str, architectures: Any, has_encoder: bool = False) -> Any:
    """transformers' class that builds a model; None: none of its classes predicts the next token of a text.

    A folder that says it is of the whole model (``architectures``) is: its adapters need the whole model's names.

    Args:
        kind: ``model_type`` in config.json.  has_encoder: ``is_encoder_decoder`` there.
    """
    if has_encoder:
        return AutoModelForSeq2SeqLM if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES else None
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if whole is not None and (not is_causal or whole in (architectures or ())):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if is_causal else None


def describes_encoder(described: Mapping[str, Any]) -> bool:
    """Is a config.json that of an encoder and a decoder?  Not if transformers does not know the type.  Pure."""
    kind = str(described.get("model_type"))
    own = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind].is_encoder_decoder
    return kind in CONFIG_MAPPING and bool(described.get("is_encoder_decoder", own))


def model_class(config: Any) -> Any:
    """As :func:`auto_class`, of a config that was let in: code of its own stands for a causal language model."""
    found = auto_class(config.model_type, config.architectures, config.is_encoder_decoder)
    return found or AutoModelForCausalLM


def drop_towers(model: Any) -> None:
    """Take out of a whole model the parts beside its language model without which its code runs on text.

    They would be loaded, sharded and gathered for nothing.  ``model.towers_dropped`` then has the beginnings of their
    names.  Models of other kinds are left as they are.
    """
    model.towers_dropped = ()
    whole = type(model).__name__ in set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    if not whole or model.config.is_encoder_decoder:
        return
    decoder, trunk = model.get_decoder(), getattr(model, model.base_model_prefix, model)
    needed = {id(module) for part in (decoder, model.get_output_embeddings()) if part for module in part.modules()}
    needed.add(id(model.get_input_embeddings()))
    if decoder is trunk or decoder not in trunk.children():
        return  # no parts side by side
    beside = [
        name for name, child in trunk.named_children() if not any(id(module) in needed for module in child.modules())
    ]
    if not _runs_without(model, trunk, beside):  # Gemma 3n looks text up in the tables of its other parts
        beside = [name for name in beside if _runs_without(model, trunk, [name])]
    begin = "" if trunk is model else f"{model.base_model_prefix}."
    for name in beside:
        delattr(trunk, name)
        model.towers_dropped += (f"{begin}{name}.",)


def _runs_without(model: Any, trunk: Any, parts: Sequence[str]) -> bool:
    """Does text pass through a model without these parts?  True where it does not pass through all of it either."""
    whole = dict(trunk._modules)
    for name in parts:
        del trunk._modules[name]
    runs = probe.run(model) is not None
    trunk._modules.clear()
    trunk._modules.update(whole)
    return runs or probe.run(model) is None
