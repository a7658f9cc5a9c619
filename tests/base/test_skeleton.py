"""The model without values: its type and attention, and what is refused by it."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.base import loading
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.config.settings import LoraConfig, ModelConfig
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
