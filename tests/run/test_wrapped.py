"""Folders of models that see, trained on text: PEFT on the whole model and a merge compute what was trained."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
)

from lora_one_dist.commands import merge_adapter
from tests import models
from tests.ranks import run_ranks
from tests.runs import metrics, settings, train

TEXT = {
    "vocab_size": models.VOCABULARY + 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
WHOLE = {
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT, vision_config=EYES | {"patch_size": 14}, mm_tokens_per_image=4, image_token_index=9
    ),
    "llava": lambda: LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=EYES | {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 32},
        image_token_index=9,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=EYES | {"model_type": "pixtral", "patch_size": 14, "head_dim": 8},
        image_token_index=9,
    ),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | SECTIONS,
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32},
        image_token_id=9,
    ),
    "qwen3.5": lambda: Qwen3_5Config(
        text_config=TEXT | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32},
        image_token_id=9,
    ),
}
TARGETS = {"gemma3": ["q_proj", "down_proj", "lm_head"]}  # whose head is tied to the embeddings


def loss_of(model, rows, tokenizer):
    """The mean over samples, each by itself."""
    losses, counts = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
        shared = sum(a == b for a, b in zip(prompt, ids, strict=False))
        targets = torch.tensor(ids[shared:])
        losses.append(torch.nn.functional.cross_entropy(logits[shared - 1 : -1], targets, reduction="sum"))
        counts.append(len(targets))
    return float(sum(losses)) / sum(counts)


@pytest.mark.full
@pytest.mark.parametrize("kind", WHOLE)
def test_the_adapter_of_a_language_model_is_one_of_the_whole(kind, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "run"
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(WHOLE[kind]()).save_pretrained(folder)
    tokenizer = models.tokenizer("qwen2" if kind.startswith("qwen") else "llama")
    tokenizer.save_pretrained(folder)
    targets = TARGETS.get(kind, "all-linear")
    changes = {"lora__target_modules": targets, "train__max_steps": 4, "data__max_length": 64}
    run_ranks(2, train, settings(folder, out, **changes))
    before, trained = (line["eval_loss"] for line in metrics(out) if "eval_loss" in line)
    assert trained < before - 0.01

    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rows = models.rows(21, seed=1)
    assert loss_of(whole.eval(), rows, tokenizer) == pytest.approx(before, rel=1e-5)
    adapted = PeftModel.from_pretrained(whole, out / "adapter").eval()
    layers = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert layers
    assert any(name.endswith("lm_head") for name in layers) == (kind in TARGETS)
    assert all(".language_model." in name or name.endswith("lm_head") for name in layers), "none in a tower"
    # fp32 in another order of summation, over two layers.
    assert loss_of(adapted, rows, tokenizer) == pytest.approx(trained, rel=1e-5)
    assert merge_adapter.main([str(folder), str(out / "adapter"), "--out", str(tmp_path / "m")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert loss_of(merged, rows, tokenizer) == pytest.approx(trained, rel=1e-5)
