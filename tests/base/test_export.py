"""What of a trained model is written, and which models are refused since they could not be."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from lora_one_dist.base import export
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.towers import drop_towers
from lora_one_dist.config.settings import ModelConfig
from tests.base.test_towers import gemma3

SETTINGS = ModelConfig(path="org/model")


def test_models_of_which_a_part_would_be_missing_and_experts_are_refused(llama):
    drop_towers(llama)
    export.refuse_untrainable(llama, SETTINGS)
    whole = gemma3()
    drop_towers(whole)
    with pytest.raises(
        ModelError, match=r"train.mode = full: Gemma3\w+ of org/model cannot be written: model.vision_tower"
    ):
        export.refuse_untrainable(whole, SETTINGS)
    with torch.device("meta"):
        mixtral = AutoModelForCausalLM.from_config(MixtralConfig(num_hidden_layers=1, num_local_experts=4))
    with pytest.raises(ModelError, match="mixture"):
        export.refuse_untrainable(mixtral, SETTINGS)


def test_what_stands_beside_the_weights_goes_along_and_says_their_type(model_folder, tmp_path):
    for path in model_folder("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "modeling_own.py").write_text("code = True\n")
    found = export.beside(tmp_path, "bf16")
    assert {"config.json", "modeling_own.py", "tokenizer.json", "tokenizer_config.json"} <= found.keys()
    assert not any("safetensors" in name for name in found)
    written = json.loads(found["config.json"])
    assert written["dtype"] == "bfloat16"
    assert "quantization_config" not in written
    assert written["hidden_size"] == described["hidden_size"]
