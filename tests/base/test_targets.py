"""Which layers are targets, and which lists of them are refused."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.targets import Target, find_targets
from lora_one_dist.config.settings import LoraConfig
from tests import models
from tests.base.checkpoints import gpt2

LLAMA_LAYER = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (72, 32),
    "mlp.up_proj": (72, 32),
    "mlp.down_proj": (32, 72),
}


def test_all_linear_is_every_linear_layer_but_the_head_in_order(llama):
    expected = [Target(f"model.layers.{i}.{name}", m, n) for i in (0, 1) for name, (m, n) in LLAMA_LAYER.items()]
    assert find_targets(llama, LoraConfig(r=16)) == expected


def test_all_linear_leaves_a_tied_head_out():
    names = [target.name for target in find_targets(models.qwen2(), LoraConfig(r=4))]
    assert len(names) == 5 * 7
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("endings", "names"),
    [
        (
            ["v_proj", "q_proj"],
            ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"],
        ),
        (["1.self_attn.v_proj"], ["1.self_attn.v_proj"]),
        (["mlp.up_proj", "0.mlp.up_proj"], ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (["model.layers.0.mlp.down_proj"], ["0.mlp.down_proj"]),
    ],
)
def test_list_matches_whole_dotted_endings_in_model_order(endings, names, llama):
    found = find_targets(llama, LoraConfig(r=4, target_modules=endings))
    assert [target.name for target in found] == [f"model.layers.{name}" for name in names]


def test_untied_head_can_be_named(llama):
    assert find_targets(llama, LoraConfig(target_modules=["lm_head"])) == [Target("lm_head", 64, 32)]


@pytest.mark.parametrize(
    ("lora", "rank_needed", "message"),
    [
        ({"target_modules": ["q_porj"]}, 0, "'q_porj' matches no layer. Did you mean q_proj"),
        ({"target_modules": ["proj"]}, 0, "'proj' matches no layer. Did you mean"),
        ({"target_modules": ["f_attn.q_proj"]}, 0, "'f_attn.q_proj' matches no layer"),
        (
            {"target_modules": ["zz"]},
            0,
            "'zz' matches no layer. Linear layers here: down_proj, gate_proj, k_proj, lm_head",
        ),
        ({"target_modules": ["q_proj", "aa", "bb"]}, 0, "'aa' matches no layer. .*'bb' matches no layer. "),
        ({"target_modules": [""]}, 0, "'' matches no layer"),
        ({"target_modules": []}, 0, r"target_modules = \[\]: no layer left to adapt. Name at least one"),
        ({"target_modules": ["mlp"]}, 0, "model.layers.0.mlp is a LlamaMLP; only nn.Linear is supported"),
        ({"target_modules": ["embed_tokens"]}, 0, "model.embed_tokens is a Embedding; only nn.Linear is supported"),
        ({"r": 17}, 0, r"lora.r = 17: must be at most min\(m, n\) = 16 of model.layers.0.self_attn.k_proj. Lower it"),
        ({"r": 33, "target_modules": ["q_proj"]}, 0, r"at most min\(m, n\) = 32 of model.layers.0.self_attn.q_proj"),
        ({"r": 10}, 20, "lora.r = 10: this init.method takes 20 singular vectors, .*k_proj has 16. Lower lora.r"),
    ],
)
def test_target_list_that_cannot_work_is_refused(lora, rank_needed, message, llama):
    with pytest.raises(ModelError, match=message):
        find_targets(llama, LoraConfig(**lora), rank_needed)


def test_rank_up_to_the_narrowest_target_is_accepted(llama):
    assert len(find_targets(llama, LoraConfig(r=16), 16)) == 14
    assert len(find_targets(llama, LoraConfig(r=32, target_modules=["q_proj"]), 32)) == 2


@pytest.mark.parametrize("endings", [["lm_head"], ["q_proj", "embed_tokens"]])
def test_target_that_shares_its_weight_is_refused(endings):
    with pytest.raises(ModelError, match=r"lm_head shares its weight with model.embed_tokens; its gradient would be"):
        find_targets(models.qwen2(), LoraConfig(r=4, target_modules=endings))


def test_transposed_layers_are_refused():
    with pytest.raises(ModelError, match=r"all-linear: the model has Conv1D layers \(transposed weights\)"):
        find_targets(gpt2(), LoraConfig(r=4))
    with pytest.raises(ModelError, match=r"h.0.attn.c_attn is a Conv1D; only nn.Linear is supported"):
        find_targets(gpt2(), LoraConfig(r=4, target_modules=["c_attn"]))


@pytest.mark.parametrize("endings", ["all-linear", ["q_proj"]])
def test_mixture_of_experts_is_refused(endings):
    with init_empty_weights(include_buffers=False):
        mixtral = AutoModelForCausalLM.from_config(MixtralConfig(num_hidden_layers=1, num_local_experts=4))
    with pytest.raises(ModelError, match=r"experts.* \(4, .*the gradient phase does not support. Use a dense model"):
        find_targets(mixtral, LoraConfig(r=4, target_modules=endings))


def test_mixture_of_experts_as_a_module_list_is_refused(llama):
    dense = models.llama(layers=1)
    dense.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.experts is a mixture of experts"):
        find_targets(dense, LoraConfig(r=4))
