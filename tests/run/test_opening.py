"""What is said of the layers before a weight is read."""

from __future__ import annotations

from lora_one_dist.base.targets import choose
from lora_one_dist.config.reading import parse_config
from lora_one_dist.run import opening
from tests import models
from tests.runs import settings


def test_ranks_and_scales_that_differ_are_told_with_an_example(tmp_path, model_folder):
    patterns = {"lora__rank_pattern": {"(k|q)_proj": 20}, "lora__alpha_pattern": {"0.mlp.up_proj": 2}}
    config = parse_config(settings(model_folder("llama"), tmp_path / "out", **patterns))
    targets, _ = choose(models.llama(layers=2), config.lora)
    assert opening._other_pairs(config, targets) == [
        "r 20, scale 1.789 in 2 of them, e.g. model.layers.0.self_attn.q_proj",
        "r 16, scale 2 in 2 of them, e.g. model.layers.0.self_attn.k_proj: 16 x 32, too narrow for r 20",
        "r 4, scale 1 in 1 of them, e.g. model.layers.0.mlp.up_proj",
    ]


def test_layers_that_are_left_out_are_told_by_reason():
    left_out = {"a.gate": "is of width 1", "v.q": "is not called for text", "v.k": "is not called for text"}
    assert opening._left_out(left_out) == [
        "all-linear leaves out 1: a.gate is of width 1",
        "all-linear leaves out 2: v.q is not called for text",
    ]
