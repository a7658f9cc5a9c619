"""What the planner says before a run: its sums and its advice.

tools/bench/phases.py and tests/run/test_memory.py hold the figures against measurements.
"""

from __future__ import annotations

import functools
import re

import pytest
from transformers import CTRLConfig, CTRLLMHeadModel

from lora_one_dist.base.targets import find_targets
from lora_one_dist.commands import plan as command
from lora_one_dist.plan import advice as advice_module
from lora_one_dist.plan.memory import host_bytes, memory_and_recomputed, memory_by_phase
from lora_one_dist.plan.prediction import predict
from lora_one_dist.plan.shape import Cluster, Shape, shape_of
from lora_one_dist.plan.wire import GLOO_SEGMENT_BYTES, _from_owner, _to_owner, gathers_a_pass
from tests import models

PARAMETERS = {  # of the models' own cards
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "llama-3.3-70b": 70_553_706_496,
}


def settings(name: str, *overrides: str):
    return command.settings_of(None, f"tools/shapes/{name}", list(overrides))


@functools.cache
def shape(name: str) -> Shape:
    """With the default settings; of a model of 80 blocks it takes seconds."""
    return command.shape_of(settings(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_models(name):
    found = shape(name)
    layers = 7 * found.layers
    assert found.parameters == PARAMETERS[name]
    assert len(found.targets) == layers
    inside = sum(target.m * target.n for target in found.targets)
    norms = (2 * found.layers + 1) * found.hidden
    assert found.parameters == inside + norms + 2 * found.lookup_only, "nothing is left out"


# Wire -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize(("hosts", "each"), [(1, 4), (4, 1), (2, 2), (3, 8)])
def test_bytes_stay_inside_one_host_and_cross_between_hosts_of_one_rank(hosts, each, backend):
    cluster = Cluster(hosts, each, backend=backend)
    for owner in (0, cluster.ranks - 1):
        for way in (_to_owner, _from_owner):
            wire = way(1e9, owner, cluster)
            assert (wire.between == 0) == (hosts == 1)
            assert wire.inside == 0 or each > 1
        sent = _from_owner(1e9, owner, cluster)
        assert sent.inside + sent.between == (cluster.ranks - 1) * 1e9, "each rank but one receives it once"


def test_one_rank_sends_nothing():
    config = settings("llama-2-7b")
    found = predict(shape("llama-2-7b"), config, Cluster(1, 1, backend="gloo"))
    assert all(wire.inside == wire.between == 0 for wire in found.wire.values())


@pytest.mark.parametrize("size", [4 * 256 * 256, 4 * 1024 * 1024, 4 * 5504 * 2048])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_gloo_reduction_sends_what_its_loop_sends(ranks, size):
    # The loop of gloo's reduce.cc, segment by segment: the last two of them are received and not sent on.
    segment = min(-(-size // (2 * ranks)), GLOO_SEGMENT_BYTES)
    segments = -(-max(-(-size // segment), 2 * ranks) // ranks) * ranks
    per_rank, sent = segments // ranks, 0
    for rank in range(ranks):
        for i in range(segments - 2):
            offset = ((rank + 1) * per_rank + i) * segment % (segments * segment)
            sent += max(0, min(segment, size - offset))
        if rank != 0:
            sent += max(0, min(per_rank * segment, size - rank * per_rank * segment))
    wire = _to_owner(size, 0, Cluster(1, ranks, backend="gloo"))
    # The last segments are shorter than the others; the plan counts them as if they were not.
    assert wire.inside == pytest.approx(sent, rel=0.05)


def test_node_sharding_sends_only_adapters_between_hosts():
    found, cluster = shape("llama-3.3-70b"), Cluster(4, 8)
    world = predict(found, settings("llama-3.3-70b"), cluster).wire["step"]
    node = predict(found, settings("llama-3.3-70b", "deepspeed.shard_group=node"), cluster).wire["step"]
    adapters = found.adapter
    # fp32 gradients and bf16 copies, each (H - 1) / H of them from each host.
    assert node.between == pytest.approx((4 + 2) * adapters * (4 - 1), rel=0.01)
    assert world.between > 50 * node.between


# Memory and work ------------------------------------------------------------------------------------------------------


def test_shares_shrink_with_ranks_and_groups():
    found = shape("llama-3.3-70b")

    def memory(ranks: int, *overrides: str):
        return predict(found, settings("llama-3.3-70b", *overrides), Cluster(1, ranks)).memory

    one, eight = memory(1), memory(8)
    assert one["step"]["base"] == 2 * found.parameters == pytest.approx(8 * eight["step"]["base"], rel=1e-6)
    assert one["step"]["gathered"] == 0, "one rank holds it whole"
    owned = 4 * sum(target.m * target.n for target in found.targets)
    assert one["gradient"]["owned"] == owned
    assert owned / 8 <= eight["gradient"]["owned"] <= 1.01 * owned / 8
    grouped = memory(8, "init.layer_groups=4", "init.num_samples=16")  # two passes: the second begins with all of it
    assert owned / 32 <= grouped["gradient"]["owned"] <= 1.05 * owned / 32
    assert memory(8, "init.buffer=host")["gradient"]["owned"] == 0
    assert memory(8, "init.halves=true")["gradient"]["owned"] == 2 * eight["gradient"]["owned"]


def test_adalora_has_two_averages_of_each_element_beside_what_lora_has():
    cluster, overrides = Cluster(1, 4), ("init.method=lora", "lora.use_rslora=false", "lora.r=12")
    of = {}
    for kind in ("lora", "adalora"):
        config = settings("llama-2-7b", *overrides, f"lora.kind={kind}")
        of[kind] = command.shape_of(config), memory_by_phase(command.shape_of(config), config, cluster)["step"]
    (plain, before), (shape_now, now) = of["lora"], of["adalora"]
    assert shape_now.adapter == plain.adapter + 12 * len(plain.targets), "E"
    assert now["states"] == pytest.approx(1.5 * before["states"], rel=1e-3)
    assert now["adapters"] == pytest.approx(before["adapters"], rel=1e-3)


def test_layer_groups_cost_half_a_pass_each():
    found, cluster = shape("llama-2-7b"), Cluster(1, 8)

    def work(groups: int) -> float:
        plan = predict(found, settings("llama-2-7b", f"init.layer_groups={groups}"), cluster)
        return plan.operations["gradient"]

    # Forward 1, recomputed 1, backward 1, gradients 0.95: 4 groups run 4 forward and (1 + 3/4 + 1/2 + 1/4) back.
    assert work(4) / work(1) == pytest.approx((4 + 2.5 * 2 + 0.95) / (1 + 2 + 0.95), rel=0.03)


@pytest.mark.parametrize("gpu", [24, 40, 80])
@pytest.mark.parametrize("cluster", [(1, 8), (4, 8), (1, 1)])
def test_advice_is_enough_and_not_too_much(cluster, gpu):
    found, config = shape("llama-3.3-70b"), settings("llama-3.3-70b", "train.micro_batch_size=2", "init.halves=true")
    place = Cluster(*cluster, bytes_per_rank=(gpu - 4) * 1e9)
    advice = advice_module.advice(found, config, place)
    phases = predict(found, config, place)
    assert len(advice) == sum(phases.peak(phase) > place.bytes_per_rank for phase in phases.memory)

    def peak(phase: str, text: str) -> int:
        text = re.sub(r"\(.*?\)", "", text)  # remarks
        changed = settings("llama-3.3-70b", "train.micro_batch_size=2", "init.halves=true", *text.split())
        return predict(found, changed, place).peak(phase)

    for line in advice:
        phase = line.split()[0]
        _, _, remedies = line.rstrip(".").partition("enough: ")
        if "One of these" in line:
            assert all(peak(phase, text) <= place.bytes_per_rank for text in remedies.split("; "))
        elif "Together" in line:
            chosen = re.sub(r"\(.*?\)", "", remedies).split()
            assert peak(phase, remedies) <= place.bytes_per_rank
            for left_out in chosen:
                assert peak(phase, " ".join(c for c in chosen if c != left_out)) > place.bytes_per_rank
        else:
            assert "No setting is enough" in line
    if cluster == (4, 8) and gpu == 80:
        assert advice == []


def test_offload_still_gathers_on_the_device_and_takes_host_memory():
    found, offload = shape("llama-3.3-70b"), ("deepspeed.config=ds_configs/zero3_offload.json",)
    alone = predict(found, settings("llama-3.3-70b", *offload), Cluster(1, 1)).memory["step"]
    shared = predict(found, settings("llama-3.3-70b", *offload), Cluster(1, 8)).memory["step"]
    assert alone["base"] == shared["base"] == 0
    assert alone["gathered"] == shared["gathered"] > 0
    both = settings("llama-3.3-70b", *offload, "init.buffer=host")
    in_host = host_bytes(found, both, Cluster(1, 8))
    owned = 4 * sum(target.m * target.n for target in found.targets)
    assert in_host == pytest.approx(2 * found.parameters + owned, rel=0.01)


def test_an_uneven_batch_takes_one_micro_batch_more():
    found, config = shape("llama-2-7b"), settings("llama-2-7b")
    work = [predict(found, config, Cluster(1, ranks)).operations["step"] for ranks in (24, 16)]
    assert work[0] == work[1], "32 samples: 2 micro-batches on 24 ranks as on 16"


def test_a_tied_head_is_multiplied_by_and_gathered_again():
    model = models.qwen2()
    tied = shape_of(model, [], 0)
    assert tied.lookup_only == 0
    assert gathers_a_pass(tied, {"stage3_max_reuse_distance": 0}) == 2
    assert shape_of(models.llama(), [], 0).lookup_only == 64 * 32


def test_phases_are_told_in_the_order_in_which_they_run():
    found = predict(shape("llama-2-7b"), settings("llama-2-7b"), Cluster(1, 8))
    assert list(found.seconds) == ["gradient", "svd", "broadcast", "step"]
    assert list(found.memory) == ["load", *found.seconds]
    drawn = predict(
        shape("llama-2-7b"), settings("llama-2-7b", "init.method=lora_ga", "init.scheme=random"), Cluster(1, 8)
    )
    assert list(drawn.seconds) == ["broadcast", "step"]
    assert list(drawn.memory) == ["load", "step"], "directions that are drawn take neither gradient nor SVD"


@pytest.mark.parametrize("gigabytes", [30, 40, 50, 60, 76])
def test_one_block_fewer_would_not_fit(gigabytes):
    config = settings("llama-3.3-70b", "data.max_length=4096", "deepspeed.shard_group=world")
    cluster = Cluster(4, 8, bytes_per_rank=gigabytes * 1e9)
    found = shape("llama-3.3-70b")
    memory, recomputed = memory_and_recomputed(found, config, cluster)
    for phase, count in recomputed.items():
        assert sum(memory[phase].values()) <= gigabytes * 1e9
        fewer = config.model_copy(update={"model": config.model.model_copy(update={"recompute": count - 1})})
        assert count == 0 or sum(memory_by_phase(found, fewer, cluster)[phase].values()) > gigabytes * 1e9


def test_a_model_without_checkpointing_recomputes_nothing_though_it_does_not_fit():
    net = CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_embd=32, dff=48, n_layer=4, n_head=4))
    config, cluster = settings("llama-2-7b"), Cluster(1, 8, bytes_per_rank=1)
    for model, count in ((net, 0), (models.llama(layers=4), 3)):
        found = shape_of(model, find_targets(model, config.lora), 0)
        assert memory_and_recomputed(found, config, cluster)[1] == {"gradient": count, "step": count}


def test_the_attention_that_a_model_has_counts():
    net = models.llama()
    net.config._attn_implementation = "eager"
    config, cluster = settings("llama-2-7b", "model.recompute=none"), Cluster(1, 8)
    assert config.model.attn_implementation == "auto"
    eager, sdpa = (shape_of(model, find_targets(model, config.lora), 0) for model in (net, models.llama()))
    more = [memory_by_phase(found, config, cluster)["step"]["activations"] for found in (eager, sdpa)]
    length = config.data.max_length
    scores = 4 + 2  # bytes: the softmax is in fp32
    assert more[0] - more[1] == scores * net.config.num_attention_heads * length * length * 4, "of 4 blocks"


def test_faster_settings_are_faster_and_fit():
    found, cluster = shape("llama-3.1-8b"), Cluster(1, 8, bytes_per_rank=76e9, inside=2e10)  # a slow wire
    slow = ("model.recompute=all", "data.max_length=512", "train.global_batch_size=64")
    named = advice_module.faster(found, settings("llama-3.1-8b", *slow), cluster)
    assert any("stage0.json" in text for text in named)
    assert any("micro_batch_size=8" in text for text in named)
    before = predict(found, settings("llama-3.1-8b", *slow), cluster).seconds["step"]
    for text in named:
        setting, _, gain = text.partition(" (")
        after = predict(found, settings("llama-3.1-8b", *slow, *setting.split()), cluster)
        assert max(map(after.peak, after.memory)) <= 76e9
        assert before / after.seconds["step"] == pytest.approx(float(gain.removesuffix(" x)")), abs=0.01)
    small = Cluster(1, 8, bytes_per_rank=12e9, inside=2e10)
    assert not any("stage0" in text for text in advice_module.faster(found, settings("llama-3.1-8b", *slow), small))
