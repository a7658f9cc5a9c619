"""The base loaded by either road, and the share of it that each rank holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_one_dist.base import loading, sharding
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import LoraConfig, ModelConfig
from tests import models
from tests.base.checkpoints import changed, ids, pickled, rename
from tests.ranks import run_ranks


def logits_by_both_roads(folders, stage, roads):
    """Runs on a rank: the logits of each folder, by slices or by ``from_pretrained``, which may read pickles."""
    load_pretrained, partitioned_while_read = sharding.load_pretrained, []

    def watched(build, ds_config):
        def watched_build():
            net = build()
            partitioned_while_read.append(all(hasattr(parameter, "ds_tensor") for parameter in net.parameters()))
            return net

        return load_pretrained(watched_build, ds_config)

    sharding.load_pretrained = watched
    deepspeed = models.deepspeed_config("zero3" if stage else "stage0", stage3_param_persistence_threshold=600)
    found = []
    for folder, sliced in zip(folders, roads, strict=True):
        settings = ModelConfig(path=folder, dtype="fp32", recompute="none", allow_pickle=True)
        planned = loading.plan(Path(folder), settings, LoraConfig(r=4), 4)
        assert (planned.sources is not None) == sliced
        base = loading.load(settings, deepspeed, planned, 1)
        assert not any(parameter.requires_grad for parameter in base.module.parameters())
        assert base.partitioned == (stage == 3)
        base.module.eval()
        with torch.no_grad():
            found.append(base.module(input_ids=ids().to(comm.device())).logits.cpu())
        names = [target.name for target in planned.targets]
        assert all(hasattr(base.module.get_submodule(name).weight, "ds_tensor") == (stage == 3) for name in names)
    pretrained = [stage == 3] * roads.count(False)
    assert partitioned_while_read == pretrained, "no rank holds the whole base"
    return found


@pytest.mark.parametrize(("world_size", "stage", "pickles"), [(1, 0, False), (2, 3, False), (1, 0, True), (2, 3, True)])
def test_names_that_do_not_map_load_to_the_same_logits(world_size, stage, pickles, model_folder, tmp_path):
    # A checkpoint of the trunk alone: no "model." in its names, and the tied head in none.
    trunk = changed(model_folder("qwen2"), tmp_path, rename, architectures=["Qwen2Model"])
    folders = [str(model_folder("qwen2")), str(pickled(trunk, tmp_path, shards=2) if pickles else trunk)]
    truth = models.qwen2().eval()(input_ids=ids()).logits.detach()
    for sliced, other in run_ranks(world_size, logits_by_both_roads, folders, stage, (True, not pickles)):
        assert torch.equal(sliced, other)
        # fp32 sums of 40 terms in the same kernels: equal but for their blocking.
        assert (sliced - truth).abs().max() <= 1e-5 * truth.abs().max()


def sharded(folder, shard_group):
    """Runs on a rank: elements held of each parameter (its own and all), the logits, and the copies there are."""
    settings = ModelConfig(path=folder, dtype="fp32", recompute="none")
    planned = loading.plan(Path(folder), settings, LoraConfig(r=4), 4)
    deepspeed = models.deepspeed_config("zero3", shard_group, stage3_param_persistence_threshold=600)
    base = loading.load(settings, deepspeed, planned, 1)
    parameters = list(base.module.parameters())
    if base.partitioned:
        held = [(parameter.ds_tensor.numel(), parameter.ds_numel) for parameter in parameters]
    else:  # every host has one rank: there is nobody to share with
        held = [(parameter.numel(), parameter.numel()) for parameter in parameters]
    with torch.no_grad():
        return held, base.module.eval()(input_ids=ids()).logits, base.copies


@pytest.mark.parametrize(
    ("hosts", "shard_group", "shares", "copies"),
    [
        ("aabb", "world", [4, 4, 4, 4], 1),
        ("aabb", "node", [2, 2, 2, 2], 2),
        ("abcd", "node", [1, 1, 1, 1], 4),
        ("aaab", "node", [3, 3, 3, 1], 2),
    ],
)
def test_each_rank_holds_its_share_of_its_groups_copy(hosts, shard_group, shares, copies, model_folder):
    truth = models.llama().eval()(input_ids=ids()).logits.detach()
    results = run_ranks(4, sharded, str(model_folder("llama")), shard_group, hosts=hosts)
    for (held, logits, found), share in zip(results, shares, strict=True):
        assert len(held) == 4 * 9 + 3, "every parameter"
        assert all(own == -(-whole // share) for own, whole in held), "rounded up: DeepSpeed pads the last share"
        assert found == copies
        assert torch.equal(logits, results[0][1])
        # fp32 sums of at most 72 terms in the same kernels: equal but for their blocking.
        assert (logits - truth).abs().max() <= 1e-5 * truth.abs().max()
