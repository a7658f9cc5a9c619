"""The model without values: its type and attention, and what is refused by it."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.base import loading
from lora_one_dist.base.skeleton import ModelError, check_tokenizer
from lora_one_dist.config.settings import LoraConfig, ModelConfig
from tests import models
from tests.base.checkpoints import changed, plan


def test_skeleton_has_the_runs_dtype_and_attention(model_folder):
    settings = ModelConfig(path="x", dtype="bf16", attn_implementation="eager")
    skeleton = loading.plan(model_folder("llama"), settings, LoraConfig(r=4), 0).skeleton
    assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}
    assert skeleton.config._attn_implementation == "eager"


def test_quantised_model_is_refused(model_folder, tmp_path):
    quantised = changed(model_folder("llama"), tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantised \(gptq\); .* Give the unquantised model"):
        plan(quantised)


def test_tokenizer_must_not_know_more_than_the_model(llama):
    tokenizer = models.tokenizer("llama")
    check_tokenizer(llama, tokenizer)  # its largest id is the model's last
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="the tokenizer's largest id is 64, the model has 64 embeddings"):
        check_tokenizer(llama, tokenizer)
