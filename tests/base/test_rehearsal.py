"""A model's own code before a weight is read: causal or not, recomputed rightly or not, and left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from lora_one_dist.base import rehearsal
from lora_one_dist.base.recompute import most_blocks
from lora_one_dist.base.rehearsal import rehearse, skip_repeated
from lora_one_dist.base.skeleton import ModelError, build_skeleton
from lora_one_dist.config.settings import ModelConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GEMMA = {
    **SIZES,
    "num_hidden_layers": 6,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": {**SIZES, "intermediate_size": 48},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_neo": {**SIZES, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    "falcon": SIZES,
    "git": {
        **SIZES,
        "intermediate_size": 48,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
        },
    },
    "ctrl": {"vocab_size": 64, "n_embd": 32, "dff": 48, "n_layer": 4, "n_head": 4},
    "gemma4_text": {**GEMMA, "global_head_dim": 8},
    "gemma3n_text": {**GEMMA, "activation_sparsity_pattern": None, "laurel_rank": 4},
    "bert": {**SIZES, "intermediate_size": 48},
    "prophetnet": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_decoder_layers": 4,
        "decoder_ffn_dim": 48,
        "num_decoder_attention_heads": 4,
        "is_encoder_decoder": False,
    },
    "bert-generation": {**SIZES, "intermediate_size": 48},
    "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
    "cpmant": {
        **SIZES,
        "dim_head": 8,
        "dim_ff": 48,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
    },
    "reformer": {
        **SIZES,
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
        "axial_pos_embds": False,
        "is_decoder": True,
    },
    "xmod": {**SIZES, "intermediate_size": 48, "languages": ["en_XX", "de_DE"]},
}


def config(**changes) -> ModelConfig:
    return ModelConfig(path="base", dtype="bf16", **changes)


def skeleton(kind: str, tmp_path: Path, settings: ModelConfig | None = None, **changes):
    AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes}).save_pretrained(tmp_path)
    return build_skeleton(settings or config(), tmp_path)


@pytest.mark.parametrize("kind", ["bert", "bert-generation", "xlnet", "cpmant", "prophetnet"])
def test_a_model_that_sees_later_tokens_is_refused(kind, tmp_path):
    rule = f"base: its model_type = '{kind}' sees the tokens that it is to predict: other tokens from position 6 on .*"
    with pytest.raises(ModelError, match=rule + "Give a model that predicts the next token"):
        rehearse(skeleton(kind, tmp_path), config(recompute="none"))


def test_a_model_that_asks_for_more_than_text_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"'xmod' does not run on text alone .ValueError: Input language unknown"):
        rehearse(skeleton("xmod", tmp_path, is_decoder=True), config())


@pytest.mark.parametrize("kind", ["bert", "bert-generation"])
def test_as_a_decoder_it_is_taken(kind, tmp_path):
    assert rehearse(skeleton(kind, tmp_path, is_decoder=True), config()) is None


CAUSAL = ["llama", "bloom", "gptj", "codegen", "gpt_neo", "mpt", "mamba", "falcon", "git"]


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_models_are_taken_with_an_attention_that_they_have(kind, checkpointing, tmp_path):
    found = skeleton(kind, tmp_path)
    assert found.config._attn_implementation == ("sdpa" if kind in ("llama", "falcon") else "eager")
    assert rehearse(found, config(checkpointing=checkpointing)) is None


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_reentrant_recomputation_of_shared_keys_and_values_is_refused(kind, tmp_path):
    found = skeleton(kind, tmp_path)
    with pytest.raises(ModelError, match=r"checkpointing = reentrant: .* another gradient .* off by .* non_reentrant"):
        rehearse(found, config(checkpointing="reentrant"))
    assert rehearse(found, config(recompute="none")) is None
    assert rehearse(found, config()) is None


def test_reentrant_recomputation_without_shared_layers_is_taken(tmp_path):
    assert (
        rehearse(skeleton("gemma4_text", tmp_path, num_kv_shared_layers=0), config(checkpointing="reentrant")) is None
    )


def test_a_model_without_checkpointing_keeps_its_blocks(tmp_path):
    found = skeleton("ctrl", tmp_path)
    assert rehearse(found, config()) is None
    assert most_blocks(found) == 0
    for asked in ("all", 2):
        with pytest.raises(ModelError, match=f"recompute = {asked}: CTRLLMHeadModel has no gradient checkpointing"):
            rehearse(found, config(recompute=asked))


def test_blocks_that_fail_when_run_again_are_refused(tmp_path, monkeypatch):
    def enable(model, **_):
        model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "gradient_checkpointing_enable", enable)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot compute its blocks again .division by zero.. Set"):
        rehearse(skeleton("llama", tmp_path), config())


def test_layers_that_run_again_in_a_backward_pass_of_their_own_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"'reformer' runs its layers again in a backward pass of its own .Chunk"):
        rehearse(skeleton("reformer", tmp_path), config(recompute="none"))


@pytest.mark.parametrize("where", ["code of the folder's own", "a GPU"])
def test_a_model_that_cannot_be_asked_is_told_of(where, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda *_, **__: 1 / 0)
    if where == "a GPU":  # whose kernels may not run on the CPU, where it is asked
        monkeypatch.setattr(rehearsal.comm, "device", lambda: torch.device("cuda"))
    else:
        monkeypatch.setattr(transformers.LlamaForCausalLM, "__module__", "transformers_modules.base.modeling")
    note = rehearse(skeleton("llama", tmp_path), config())
    assert "whether LlamaForCausalLM is causal, and may recompute, could not be checked" in note
    assert "ZeroDivisionError" in note


@pytest.mark.parametrize("name", ["llama-3.3-70b", "bert-generation"])
def test_at_real_widths(name, tmp_path):
    if name == "bert-generation":
        AutoConfig.for_model(name).save_pretrained(tmp_path)  # 24 layers, 1024 wide
        with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
            rehearse(build_skeleton(config(), tmp_path), config())
    else:
        assert rehearse(build_skeleton(config(), Path("tools/shapes") / name), config()) is None


def test_the_skeleton_and_the_generator_are_left_as_they_were(tmp_path):
    found = skeleton("llama", tmp_path)
    before, training = torch.get_rng_state(), found.training
    rehearse(found, config())
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    assert found.training == training
    assert not found.is_gradient_checkpointing
    assert not found.get_input_embeddings()._forward_hooks
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpus_attention_is_asked_by_another(tmp_path):
    found = skeleton("llama", tmp_path)
    found.config._attn_implementation = "varlen"
    assert rehearse(found, config()) is None
    assert found.config._attn_implementation == "varlen"


class Block(nn.Module):
    def __init__(self, layer_idx: int, window: int):
        super().__init__()
        self.layer, self.layer_idx, self.window, self.runs = nn.Linear(4, 4), layer_idx, window, []

    def forward(self, hidden):
        self.runs.append(self.window)
        return self.layer(hidden), "beside"


def test_two_blocks_of_each_kind_run():
    net = nn.ModuleList(Block(i, window=i % 2) for i in range(8))
    skip_repeated(net)
    hidden = torch.ones(1, 4)
    for block in net:
        hidden, beside = block(hidden)
        assert beside == "beside"
    assert [len(block.runs) for block in net] == [1] * 2 * rehearsal.KEPT + [0] * (8 - 2 * rehearsal.KEPT)
