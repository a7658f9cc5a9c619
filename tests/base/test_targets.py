"""Which layers are targets, and which lists of them are refused."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from lora_one_dist.adapters.lora import peft_config
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
    expected = [
        Target(f"model.layers.{i}.{name}", m, n, 16, 4.0) for i in (0, 1) for name, (m, n) in LLAMA_LAYER.items()
    ]
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
    assert find_targets(llama, LoraConfig(target_modules=["lm_head"])) == [Target("lm_head", 64, 32, 8, 16 / 8**0.5)]


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
        ({"r": 33}, 0, r"lora.r = 33: must be at most min\(m, n\) = 32 of model.layers.0.self_attn.q_proj. Lower it"),
        ({"r": 33, "target_modules": ["q_proj"]}, 0, r"at most min\(m, n\) = 32 of model.layers.0.self_attn.q_proj"),
        ({"r": 17}, 34, "lora.r = 17: this init.method takes 34 singular vectors, .*q_proj has 32. Lower lora.r"),
        (
            {"rank_pattern": {"k_proj": 17}},
            0,
            r"lora.rank_pattern.k_proj = 17: must be at most min\(m, n\) = 16 of mod",
        ),
        (
            {"rank_pattern": {"k_proj": 9}},
            16,
            "lora.rank_pattern.k_proj = 9: this init.method takes 18 singular vector",
        ),
        ({"rank_pattern": {"k_porj": 4}}, 0, "lora.rank_pattern: 'k_porj' matches no layer. Did you mean k_proj"),
        (
            {"rank_pattern": {"lm_head": 4}},
            0,
            "lora.rank_pattern: 'lm_head' matches no layer. Linear layers here: down",
        ),
        ({"alpha_pattern": {"_proj": 4}}, 0, "lora.alpha_pattern: '_proj' matches no layer. Did you mean"),
        ({"exclude_modules": ["q_proj", "mlp"]}, 0, "lora.exclude_modules: 'mlp' matches no layer. Linear layers here"),
        ({"exclude_modules": "q_proj"}, 0, "lora.exclude_modules: 'q_proj' matches no layer. Did you mean q_proj"),
        ({"exclude_modules": ".*proj"}, 0, "target_modules = all-linear: no layer left to adapt"),
    ],
)
def test_target_list_that_cannot_work_is_refused(lora, rank_needed, message, llama):
    with pytest.raises(ModelError, match=message):
        find_targets(llama, LoraConfig(**lora), rank_needed)


@pytest.mark.parametrize(
    ("lora", "rank_needed", "expected"),
    [
        ({"r": 17}, 0, {"k_proj": 16, "v_proj": 16, "q_proj": 17, "down_proj": 17}),
        ({"r": 10}, 20, {"k_proj": 8, "v_proj": 8, "q_proj": 10, "down_proj": 10}),
        ({"r": 4, "rank_pattern": {r".*\.(v|q)_proj": 20, "q_proj": 2}}, 0, {"k_proj": 4, "v_proj": 16, "q_proj": 20}),
        ({"r": 4, "rank_pattern": {"0.self_attn.v_proj": 2}}, 0, {"0.self_attn.v_proj": 2, "1.self_attn.v_proj": 4}),
        ({"r": 4, "rank_pattern": {"^model.layers.1.self_attn.v_proj": 2}}, 0, {"1.self_attn.v_proj": 2}),
        ({"r": 99, "rank_pattern": {"proj": 1, ".*_proj": 3}}, 0, None),
    ],
)
def test_each_layer_has_the_rank_of_its_pattern_as_far_as_it_is_wide(lora, rank_needed, expected, llama):
    settings = LoraConfig(alpha=6, **lora)
    if expected is None:
        with pytest.raises(ModelError, match=r"rank_pattern: 'proj' matches no layer"):
            find_targets(llama, settings)
        return
    found = {target.name: target for target in find_targets(llama, settings, rank_needed)}
    for name, target in found.items():
        wanted = next((r for ending, r in expected.items() if name.endswith(ending)), settings.r)
        assert (target.r, target.scaling) == (wanted, 6 / wanted**0.5)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["v_proj", "0.mlp.up_proj"], 14 - 3),
        (r".*\.1\..*", 7),
        (r"model\.layers\.\d\.mlp\.\w+", 8),
        ([], 14),
    ],
)
def test_excluded_layers_are_those_that_peft_excludes(exclude, left, llama):
    lora = LoraConfig(r=4, exclude_modules=exclude, rank_pattern={"q_proj": 2}, alpha_pattern={"0.*q_proj": 3})
    targets = find_targets(llama, lora)
    assert len(targets) == left
    adapted = get_peft_model(models.llama(layers=2), peft_config(lora, targets, "x"))
    layers = {name: layer for name, layer in adapted.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert list(layers) == [target.name for target in targets]
    for target in targets:
        layer = layers[target.name]
        assert (layer.r["default"], layer.scaling["default"]) == (target.r, pytest.approx(target.scaling, rel=1e-12))


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
