"""Peak memory of the load and of the gradient phase on a model of over 300 M parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import models
from tests.ranks import run_ranks
from tools.bench.tensor_bytes import TensorBytes, host_bytes, reset_host_peak

HIDDEN, INTERMEDIATE, LAYERS, WORDS, TOKENS = 1024, 2816, 26, 4096, 32
MIB = 2**20
MAX_LIVE = 15_000_000  # parameters that ZeRO-3 may hold gathered: little more than one block's

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=128,
        )
    )
    assert sum(parameter.numel() for parameter in model.parameters()) > 300e6
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="400MB")
    return folder


def load_and_differentiate(folder: Path, groups: int, parts: int, buffer: str):
    """Runs on a rank: host peak of the load over its own shard, tensor peak of the gradient phase, and its terms."""
    from lora_one_dist import comm, config, gradient, model, ownership

    settings = config.ModelConfig(path=str(folder), dtype="fp32")
    zero = {
        "stage3_max_live_parameters": MAX_LIVE,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 1_000_000,
    }
    deepspeed = models.deepspeed_config("zero3", **zero)
    plan = model.plan(folder, settings, config.LoraConfig(r=8), 8)
    reset_host_peak()
    before = host_bytes("VmRSS")
    base = model.load(settings, deepspeed, plan, 1)
    load_peak = host_bytes() - before
    parameters = list(base.module.parameters())
    total = sum(p.ds_numel for p in parameters)
    shard = 4 * sum(p.ds_tensor.numel() for p in parameters)

    samples = [{"input_ids": s["input_ids"] * 8, "labels": s["labels"] * 8} for s in models.samples(8)]
    samples = [{key: value[:TOKENS] for key, value in sample.items()} for sample in samples]
    batch = gradient.deal_micro_batches(samples, 1, "token", parts, 0)
    targets = plan.targets
    costs = [float(t.m * t.n) for t in targets]
    group = ownership.split(costs, groups)[-1]
    layers = [targets[i] for i in group]
    owners = ownership.assign([costs[i] for i in group], comm.world_size())
    owned = [layer for layer, owner in zip(layers, owners, strict=True) if owner == comm.rank()]
    shape = gradient.PassShape(total, comm.world_size(), TOKENS, HIDDEN, INTERMEDIATE, LAYERS, WORDS, 4, True, MAX_LIVE)
    terms = gradient.peak_terms(shape, layers, owned, parts)
    held = [p.ds_tensor for p in parameters] + [p.data for p in parameters] + list(base.module.buffers())
    with TensorBytes(held) as counted:
        kept = [gradient.full_gradient(base, layers, owners, part, buffer)[0] for part in batch]  # until the SVDs
    del kept
    return load_peak, shard, counted.peak, terms


@pytest.mark.parametrize(("world_size", "groups", "parts"), [(2, 1, 1), (2, 3, 2), (4, 1, 2), (4, 3, 1)])
def test_peak_memory(world_size, groups, parts, large_folder):
    for rank, (load_peak, shard, peak, terms) in enumerate(
        run_ranks(world_size, load_and_differentiate, large_folder, groups, parts, "device")
    ):
        named = sum(terms.values())
        print(f"{world_size} ranks, {groups} groups, {parts} parts, rank {rank}, MiB:")
        print(f"  load: peak {load_peak / MIB:.0f}, own shard {shard / MIB:.0f}, ratio {load_peak / shard:.2f}")
        print(f"  gradient: peak {peak / MIB:.0f}, named {named / MIB:.0f}, ratio {peak / named:.2f}")
        print("  terms: " + ", ".join(f"{name} {value / MIB:.0f}" for name, value in terms.items()))
        assert load_peak <= 1.3 * shard
        assert 0.7 * named <= peak <= 1.1 * named, "the terms say what there is: no less, and no more"
