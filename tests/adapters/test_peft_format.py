"""PEFT's names: those that PEFT itself writes for each kind of adapter, and what they mean here."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from lora_one_dist.adapters import peft_format, peft_settings
from lora_one_dist.disk.lazy import ConversionError, LazyTensor
from tests import models

KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "saved": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    "lora_bias": {"lora_bias": True, "bias": "lora_only"},
    "bias": {"bias": "all"},
    "parameters": {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied weights
def test_names_of_a_live_model_become_those_that_peft_saves(kind, adapter):
    settings = LoraConfig(**{"target_modules": ["q_proj"], **KINDS[kind]})
    live = get_peft_model(models.qwen2(), settings, adapter_name=adapter)
    trained = [name for name, parameter in live.named_parameters() if parameter.requires_grad]
    written = get_peft_model_state_dict(live, adapter_name=adapter, save_embedding_layers=False)
    assert {peft_format.name_on_disk(f"module.{name}") for name in trained} == written.keys()
    own = [name for name in trained if not (name.endswith(".bias") and ".lora_B." not in name)]
    assert {a for name in own for a in peft_format.adapters_in(name)} == {adapter}
    lazy = {name: LazyTensor(t.dtype, tuple(t.shape), t.clone) for name, t in written.items()}
    opened = peft_format.check(live.peft_config[adapter].to_dict(), lazy, "adapter")
    found = opened.weights.keys() | opened.biases.keys() | opened.replaced.keys() | opened.rows.keys()
    assert found <= models.qwen2().state_dict().keys(), "each is for a tensor of the base"


def lazy(*shape: int) -> LazyTensor:
    return LazyTensor(torch.float32, shape, lambda: torch.zeros(shape))


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "modules_to_save": ["head"]}
PAIR = {"base_model.model.q.lora_A.weight": lazy(2, 5), "base_model.model.q.lora_B.weight": lazy(3, 2)}


def test_of_a_module_that_was_saved_whole_the_trained_copy_counts():
    """PEFT writes a resized embedding three times: trained, trained again, and as it was."""
    whole = {f"base_model.model.embed_tokens.{name}weight": lazy(7, 5) for name in ("modules_to_save.", "")}
    before = {"base_model.model.embed_tokens.original_module.weight": lazy(7, 5)}
    copy, trained = whole.values()
    for tensors, counts in (
        (whole | before, trained),
        (before | dict(reversed(whole.items())), trained),
        ({next(iter(whole)): copy} | before, copy),  # where the state was gathered without what is frozen
    ):
        opened = peft_format.check(CONFIG, PAIR | tensors, "adapter")
        assert opened.replaced.keys() == {"embed_tokens.weight"}
        assert opened.replaced["embed_tokens.weight"] is counts
        assert opened.vocabulary == 7


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"bias": "some"}, {}, "bias is some, must be none or all or lora_only"),
        ({}, {"tail.weight": lazy(3)}, r"tail\.weight is neither of LoRA nor of modules_to_save"),
        ({}, {"q.lora_B.bias": lazy(3)}, r"q has an unexpected lora_B\.bias"),
        ({"lora_bias": True}, {}, r"q lacks lora_B\.bias"),
        ({"kasa_config": {"beta": 1}}, {}, r"kasa_config is {'beta': 1}.* Leave it to PEFT"),
        ({"target_parameters": ["q.weight"], "r": 1}, {}, "more than 2 dimensions.* Leave it to PEFT"),
        ({}, {"e.token_adapter.trainable_tokens_delta": lazy(2, 5)}, "trainable_token_indices is None, must be token"),
        (
            {"trainable_token_indices": [-1, 2]},
            {"e.token_adapter.trainable_tokens_delta": lazy(2, 5)},
            r"trainable_token_indices is \[-1, 2\], must be token",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, tensors, message):
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(ConversionError, match=message):
        peft_format.check(CONFIG | changes, PAIR | named, "adapter")


def test_tokens_of_each_embedding():
    told = {"embed_tokens": [1, 2], "lm_head": [3]}
    assert peft_settings.tokens_of({"trainable_token_indices": told}, "model.embed_tokens") == [1, 2]
    assert peft_settings.tokens_of({"trainable_token_indices": told}, "lm_head") == [3]
    assert peft_settings.tokens_of({"trainable_token_indices": {"embed_tokens": [1]}}, "lm_head") == [1], "it is tied"
    assert peft_settings.tokens_of({"trainable_token_indices": [4]}, "transformer.wte") == [4]
    assert peft_settings.tokens_of({"trainable_token_indices": "4"}, "transformer.wte") is None


def test_endings_within_a_language_model_are_taken_within_it_once():
    inside = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    endings = ["language_model.layers.0.self_attn.q_proj", "language_model.layers.1.self_attn.q_proj", "o_proj"]
    pattern = peft_settings.target_modules(endings, [*inside, "model.language_model.layers.0.self_attn.o_proj"])
    assert all(re.fullmatch(pattern, name) for name in inside)
    assert not re.fullmatch(pattern, "model.audio_tower.layers.0.self_attn.q_proj")
    assert not re.fullmatch(pattern, "model.audio_tower.layers.0.self_attn.o_proj")


def test_a_module_is_saved_whole_by_the_end_of_its_name_or_with_one_around_it():
    config = {"modules_to_save": ["norm", "0.mlp"]}
    for module in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj"):
        assert peft_settings.saved_whole(config, module)
    for module in ("model.layers.1.mlp", "model.norms", "lm_head"):
        assert not peft_settings.saved_whole(config, module)
