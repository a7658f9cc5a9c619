"""Adapters around the base's layers: PEFT's description of them, and those that it would put elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import CTRLConfig, CTRLLMHeadModel

from lora_one_dist.adapters.lora import inject_adapters, peft_config
from lora_one_dist.base import sharding
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.targets import find_targets
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import LoraConfig
from tests import models
from tests.base import conftest

llama = conftest.llama


def test_peft_config_names_the_endings_of_all_linear(llama):
    lora = LoraConfig(r=4, alpha=10, dropout=0.25, use_rslora=False)
    found = peft_config(lora, find_targets(llama, lora), "org/base")
    endings = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(found.target_modules) == endings, "not lm_head"
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 10, 0.25, False)
    assert (found.base_model_name_or_path, found.task_type, found.bias) == ("org/base", "CAUSAL_LM", "none")


def test_a_number_alone_is_no_ending():
    net = CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_embd=32, dff=48, n_layer=3, n_head=4)).requires_grad_(False)
    lora = LoraConfig(r=4)
    targets = find_targets(net, lora)
    found = peft_config(lora, targets, "x")
    assert {"ffn.0", "ffn.2"} < set(found.target_modules), "0 and 2 would be blocks too"
    adapters = inject_adapters(sharding.Base(net, copies=1), found, targets, "fp32")
    assert [adapter.target for adapter in adapters] == targets


def test_peft_config_keeps_a_given_list_and_takes_changes(llama):
    lora = LoraConfig(r=4, target_modules=["0.self_attn.q_proj", "v_proj"])
    found = peft_config(lora, find_targets(llama, lora), "x", r=8, lora_alpha=3.5)
    assert set(found.target_modules) == {"0.self_attn.q_proj", "v_proj"}
    assert (found.r, found.lora_alpha, found.use_rslora) == (8, 3.5, True)


def test_adapters_come_in_target_order_around_the_frozen_weights():
    net = models.llama(layers=2).requires_grad_(False).to(comm.device())
    lora = LoraConfig(r=4, target_modules=["1.self_attn.v_proj", "0.mlp.down_proj"])
    targets = find_targets(net, lora)
    weights = {target.name: net.get_submodule(target.name).weight for target in targets}
    adapters = inject_adapters(sharding.Base(net, copies=1), peft_config(lora, targets, "x"), targets, "bf16")
    assert [adapter.target for adapter in adapters] == targets
    for adapter in adapters:
        assert adapter.weight is weights[adapter.target.name]
        assert (tuple(adapter.A.shape), tuple(adapter.B.shape)) == ((4, adapter.target.n), (adapter.target.m, 4))
        assert {adapter.A.dtype, adapter.B.dtype} == {torch.bfloat16}
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for adapter in adapters for parameter in (adapter.A, adapter.B)}


def test_layers_that_peft_takes_beyond_the_targets_are_refused():
    net = models.llama(layers=2)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    targets = find_targets(net, lora)
    with pytest.raises(ModelError, match=r"differ in \['model.layers.1.self_attn.q_proj'\]. Name the layers by longer"):
        inject_adapters(sharding.Base(net, copies=1), peft_config(lora, targets, "x"), targets[:1], "fp32")
