"""Which layers are targets, and which lists of them are refused."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, DogeConfig, MambaConfig, MixtralConfig

from lora_one_dist.adapters.lora import peft_config
from lora_one_dist.base import targets as targets_module
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.targets import Target, choose, find_targets
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
        ({"target_modules": ["mlp"]}, 0, "model.layers.0.mlp is a LlamaMLP; only nn.Linear and Conv1D are supported"),
        (
            {"target_modules": ["embed_tokens"]},
            0,
            "model.embed_tokens is a Embedding; only nn.Linear and Conv1D are supp",
        ),
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


def test_target_that_shares_its_weight_is_refused_where_that_would_change():
    lora = LoraConfig(r=4, target_modules=["lm_head"])
    assert [target.name for target in find_targets(models.qwen2(), lora)] == ["lm_head"]
    with pytest.raises(ModelError, match=r"lm_head shares its weight with model.embed_tokens, and this init.method ch"):
        find_targets(models.qwen2(), lora, changes_base=True)


def test_all_linear_leaves_out_what_shares_its_weight_where_that_would_change(llama):
    layers = llama.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    assert len(find_targets(llama, LoraConfig(r=4))) == 14
    targets, left_out = choose(llama, LoraConfig(r=4), changes_base=True)
    assert len(targets) == 12
    assert set(left_out) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}


def test_transposed_layers_are_targets_of_their_own_shape():
    targets = find_targets(gpt2(), LoraConfig(r=4))
    expected = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    for i in (0, 1):
        shapes = {t.name.removeprefix(f"transformer.h.{i}."): (t.m, t.n) for t in targets if f".{i}." in t.name}
        assert shapes == expected
    assert all(target.transposed for target in targets)
    assert peft_config(LoraConfig(r=4), targets, "x").fan_in_fan_out


class Pair(nn.Linear):
    """Gives its bias apart, as layers do whose bias is added later."""

    def forward(self, x):
        return super().forward(x), self.bias


class Odd(nn.Module):
    """Layers that cannot be adapted, around two that can."""

    def __init__(self):
        super().__init__()
        self.up, self.o_proj, self.pair = nn.Linear(32, 48), nn.Linear(48, 32), Pair(32, 48)
        self.gate, self.read = nn.Linear(32, 1), nn.Linear(32, 48, bias=False)
        self.tower = nn.ModuleDict({"o_proj": nn.Linear(48, 32)})  # of images
        self.pooler = nn.Linear(32, 48)

    def forward(self, x, images=None):
        up, (pair, bias), read = self.up(x), self.pair(x), nn.functional.linear(x, self.read.weight)
        self.pooled = self.pooler(x)
        return self.o_proj(up + pair + bias + read) * self.gate(x).sigmoid()


LEFT_OUT = {
    "pair": "returns more than one tensor",
    "gate": "is of width 1",
    "read": "is not called for text",
    "tower.o_proj": "is not called for text",
    "pooler": "has no part in the logits",
}


def test_all_linear_leaves_out_what_cannot_be_adapted():
    net = models.llama(layers=2)
    net.model.layers[1].mlp = Odd()
    targets, left_out = choose(net, LoraConfig(r=4))
    assert left_out == {f"model.layers.1.mlp.{name}": why for name, why in LEFT_OUT.items()}
    names = [target.name for target in targets]
    assert [name for name in names if "1.mlp" in name] == ["model.layers.1.mlp.up", "model.layers.1.mlp.o_proj"]
    assert len(names) == 4 + 3 + 4 + 2
    assert not any(layer._forward_hooks for layer in net.modules()), "the model itself is as it was"
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    adapted = get_peft_model(net, peft_config(LoraConfig(r=4), targets, "x"))  # the tower ends in o_proj, too
    assert [name for name, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)] == names


def test_a_model_whose_shapes_hang_on_values_is_asked_with_thin_ones(monkeypatch):
    net = models.llama(layers=2)
    net.model.layers[1].mlp = Odd()
    forward = type(net).forward

    def cut(self, input_ids, **kwargs):
        assert bool((input_ids == input_ids).all()), "neither meta nor fake tensors can say"
        return forward(self, input_ids=input_ids[:, : int(input_ids.max())], **kwargs)

    monkeypatch.setattr(type(net), "forward", cut)
    assert set(choose(net, LoraConfig(r=4))[1]) == {f"model.layers.1.mlp.{name}" for name in LEFT_OUT}


@pytest.mark.parametrize("name", [name for name in LEFT_OUT if name != "gate"])
def test_what_cannot_be_adapted_is_refused_where_it_is_named(name):
    net = models.llama(layers=2)
    net.model.layers[1].mlp = Odd()
    with pytest.raises(ModelError, match=rf"target_modules: model.layers.1.mlp.{name} {LEFT_OUT[name]}. Leave it out"):
        find_targets(net, LoraConfig(r=4, target_modules=["q_proj", name]))


def on_meta(config):
    with init_empty_weights(include_buffers=False):
        net = AutoModelForCausalLM.from_config(config)
    net.tie_weights()
    return net


def test_layers_that_others_read_and_that_peft_refuses_are_left_out_of_state_space_models():
    net = on_meta(MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64))
    targets, left_out = choose(net, LoraConfig(r=2))
    assert {target.name.rpartition(".")[2] for target in targets} == {"in_proj", "x_proj"}
    reasons = {name.removeprefix("backbone.layers.1.mixer."): why for name, why in left_out.items() if ".1." in name}
    assert reasons == {"dt_proj": "is not called for text", "out_proj": "is one that PEFT refuses"}


def test_a_narrow_layer_of_a_model_type_has_the_rank_it_can():
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    targets = find_targets(on_meta(DogeConfig(intermediate_size=72, vocab_size=64, **shape)), LoraConfig(r=4))
    assert {t.name.rpartition(".")[2]: t.r for t in targets if t.r != 4} == {"dt_proj": 2}
    assert peft_config(LoraConfig(r=4), targets, "x").rank_pattern == {"dt_proj": 2}


def test_a_router_is_told_from_a_shared_expert_as_wide_as_there_are_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(16, 8, 32))

    block = nn.ModuleDict({"experts": Experts(), "router": nn.ModuleDict({"layer": nn.Linear(32, 16)})})
    block["gate"], block["shared"] = (
        nn.Linear(32, 16),
        nn.ModuleDict({"up": nn.Linear(32, 16), "gate": nn.Linear(32, 16)}),
    )
    block["conv"] = nn.Conv1d(16, 16, 4)
    modules = dict(nn.ModuleDict({"mlp": block, "q_proj": nn.Linear(32, 16)}).named_modules())
    assert targets_module._routers(modules) == ["mlp.router.layer", "mlp.gate"]


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
