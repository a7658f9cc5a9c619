"""Reading slices of safetensors files, and the ZeRO JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_one_dist.base import sharding
from lora_one_dist.base.blocks import blocks
from lora_one_dist.base.loss import loss_sum
from lora_one_dist.data import batches
from lora_one_dist.disk import weights
from tests import models, reference
from tests.disk import test_weights
from tests.ranks import run_ranks

tensors, whole = test_weights.tensors, test_weights.whole


@pytest.mark.parametrize("slab_bytes", [4, 44, 16 * 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slabs_and_casts(dtype, slab_bytes, tensors, monkeypatch):
    values, path = tensors
    monkeypatch.setattr(sharding, "SLAB_BYTES", slab_bytes)
    parameter = torch.nn.Parameter(torch.zeros(37, 11, dtype=dtype), requires_grad=False)
    with path.open("rb") as file:
        sharding._read_own(parameter, [whole(weights.read_header(path)["matrix"])], {path: file})
    assert torch.equal(parameter, values["matrix"].to(dtype))


def test_a_file_that_shrinks_is_noticed(tensors):
    _, path = tensors
    source = weights.read_header(path)["matrix"]
    path.write_bytes(path.read_bytes()[: source.offset + 8])
    with path.open("rb") as file, pytest.raises(weights.WeightsError, match="ended early"):
        sharding._read_own(torch.nn.Parameter(torch.zeros(37, 11), requires_grad=False), [whole(source)], {path: file})


@pytest.mark.parametrize("slab_bytes", [44, 16 * 2**20])
def test_add_low_rank_on_a_whole_weight(slab_bytes, monkeypatch):
    monkeypatch.setattr(sharding, "SLAB_BYTES", slab_bytes)
    generator = torch.Generator().manual_seed(1)
    W, B, A = (torch.randn(*shape, generator=generator) for shape in ((37, 11), (37, 3), (3, 11)))
    weight = torch.nn.Parameter(W.bfloat16(), requires_grad=False)
    before = weight.detach().float().clone()
    squared_error = sharding.add_low_rank(weight, B, A, -0.5)
    exact = before - 0.5 * B @ A
    assert torch.equal(weight, exact.bfloat16())
    assert squared_error == pytest.approx(float((exact.bfloat16().float() - exact).square().sum()), rel=1e-5)


def changed_while_whole(folder):
    """Runs on a rank: a persistent weight, what is added, and after that its whole copy and the ranks' shares."""
    from tests.initialise.test_gradient import load_base

    base, targets = load_base(folder, "zero3")
    with torch.no_grad():
        for _ in range(2):  # DeepSpeed keeps nothing of the first, whose order it records
            loss_sum(base.module, batches.collate(models.samples(2), 0))
    weights_of_targets = [base.module.get_submodule(target.name).weight for target in targets]
    weight = next(weight for weight in weights_of_targets if weight.ds_persist)
    before = weight.detach().clone()
    assert tuple(before.shape) == tuple(weight.ds_shape), "the second pass leaves it whole"
    generator = torch.Generator().manual_seed(1)
    B, A = (torch.randn(*shape, generator=generator) for shape in ((before.shape[0], 3), (3, before.shape[1])))
    sharding.add_low_rank(weight, B, A, -0.5)
    whole = weight.detach().clone()
    base.release_all()
    with base.gathered([weight]):
        return [tensor.cpu() for tensor in (before, -0.5 * B @ A, whole, weight.detach().clone())]


def test_add_low_rank_on_a_persistent_weight_changes_its_whole_copy_and_the_shares(model_folder):
    for before, change, whole, shares in run_ranks(2, changed_while_whole, model_folder("llama")):
        expected = before.double() + change.double()
        assert reference.relative(whole, expected) <= 1e-6  # fp32: one rounding of it and of the change
        assert reference.relative(shares, expected) <= 1e-6


@pytest.mark.parametrize("path", sorted(Path("ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_policies_hold_memory_policy_only(path):
    policy = json.loads(path.read_text())
    assert set(policy) == {"zero_optimization"}
    full = sharding.deepspeed_config(policy, "bf16", 3)
    assert full["bf16"] == {"enabled": True}
    assert full["train_micro_batch_size_per_gpu"] == 3
    assert policy == json.loads(path.read_text()), "the policy itself is left alone"


def test_a_whole_block_is_fetched_ahead_unless_the_json_says_otherwise():
    found = sharding.with_fetch_sizes({"stage": 3, "stage3_max_reuse_distance": 100}, 1000)
    assert found["stage3_prefetch_bucket_size"] == 1000
    assert found["stage3_max_live_parameters"] >= 100 + 2 * 1000, "room for what is kept, at work and fetched ahead"
    given = {"stage": 3, "stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": 8}
    assert sharding.with_fetch_sizes(given, 1000) == given


def released_as_a_whole(folder, limit):
    """Runs on a rank: which blocks DeepSpeed treats as one, and what it was told."""
    from tests.initialise.test_gradient import load_base

    more = {} if limit is None else {"stage3_max_live_parameters": limit}
    base, _ = load_base(folder, "zero3", **more)
    coordinator = base.engine.optimizer.get_param_coordinator()
    fetched = coordinator._PartitionedParameterCoordinator__prefetch_bucket_sz
    return [block._z3_leaf for block in blocks(base.module)], fetched


def test_blocks_above_the_limit_of_the_json_are_gathered_part_by_part(model_folder):
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(models.llama())]
    whole, fetched = run_ranks(2, released_as_a_whole, model_folder("llama"), None)[0]
    assert whole == [True] * 4
    assert fetched == max(sizes)
    parts, _ = run_ranks(2, released_as_a_whole, model_folder("llama"), max(sizes) - 1)[0]
    assert parts == [False] * 4


def elements_gathered_a_pass(folder, distance):
    """Runs on a rank: of each pass forward and back that comes after two passes without backward."""
    from tests.initialise.test_gradient import load_base

    base, _ = load_base(folder, "zero3", stage3_max_reuse_distance=distance)
    stock: Any = sys.modules["deepspeed.runtime.zero.partition_parameters"]
    gathered: list[int] = []
    gather = stock._dist_allgather_fn

    def counting(own: torch.Tensor, whole: torch.Tensor, *rest: object) -> object:
        gathered.append(whole.numel())
        return gather(own, whole, *rest)

    stock._dist_allgather_fn = counting
    batch = batches.collate(models.samples(2), 0)
    try:
        with torch.no_grad():
            for _ in range(2):
                loss_sum(base.module, batch)
        base.release_all()
        found = []
        for _ in range(4):
            gathered.clear()
            loss_sum(base.module, batch).backward()
            base.release()
            found.append(sum(gathered))
    finally:
        stock._dist_allgather_fn = gather
    return found, sum(p.ds_numel for p in base.module.parameters() if not p.ds_persist)


def test_what_is_kept_for_reuse_is_gathered_once_also_after_an_evaluation(model_folder):
    """An evaluation has no backward: what DeepSpeed may release after each of its layers is not what training may."""
    passes, base = run_ranks(2, elements_gathered_a_pass, model_folder("llama"), 10**9)[0]
    assert passes[-1] == base
    passes, base = run_ranks(2, elements_gathered_a_pass, model_folder("llama"), 0)[0]
    assert 1.5 * base < passes[-1] <= 2 * base
