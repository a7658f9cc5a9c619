"""Peak memory of the load and of the gradient phase on a model of over 140 M parameters."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from tests import models
from tests.ranks import run_ranks
from tools.bench.tensor_bytes import TensorBytes, host_bytes, reset_host_peak

HIDDEN, INTERMEDIATE, LAYERS, WORDS, TOKENS = 1024, 2816, 12, 4096, 32
MIB = 2**20

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
    assert sum(parameter.numel() for parameter in model.parameters()) > 140e6
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="400MB")
    return folder


def config_of(folder: Path, groups: int, halves: bool, zero_json: Path) -> dict:
    data = zero_json.with_name("train.jsonl")
    data.write_text(json.dumps({"text": "w3"}), encoding="utf-8")  # checked to be there; the samples are made below
    return {
        "model": {"path": str(folder), "dtype": "fp32", "recompute": "all"},
        "data": {"train": str(data), "format": "text", "max_length": TOKENS},
        "lora": {"r": 8},
        "init": {"num_samples": 8, "layer_groups": groups, "halves": halves},
        "train": {"max_steps": 0, "micro_batch_size": 1},
        "deepspeed": {"config": str(zero_json)},
        "output_dir": "none",
    }


CASES = [(2, 1, 1), (2, 3, 2), (4, 1, 2), (4, 3, 1)]  # ranks, layer groups, parts of the batch


def load_and_differentiate(raws: list[dict]):
    """Runs on a rank, for each config: host peak of the load, own shard, the gradient phase's peak and its terms."""
    from lora_one_dist.base import loading
    from lora_one_dist.config.reading import parse_config
    from lora_one_dist.plan.shape import shape_of

    found = []
    for raw in raws:  # each on a base of its own: DeepSpeed fetches ahead by the passes that one has seen
        settings = parse_config(raw)
        plan = loading.plan(Path(settings.model.path), settings.model, settings.lora, 8)
        shape = shape_of(plan.skeleton, plan.targets, 100_000)
        reset_host_peak()
        before = host_bytes("VmRSS")
        base = loading.load(settings.model, settings.deepspeed, plan, 1)
        load_peak = host_bytes() - before
        shard = 4 * sum(p.ds_tensor.numel() for p in base.module.parameters())
        found.append((load_peak, shard, *differentiate(base, plan.targets, shape, settings)))
        del plan, base
        gc.collect()
    return found


def differentiate(base, targets, shape, settings):
    """Largest tensor peak over the layer groups of the gradient phase, and the terms that the planner names."""
    from lora_one_dist.cluster import comm
    from lora_one_dist.initialise import gradient, pairs
    from lora_one_dist.plan.prediction import predict
    from lora_one_dist.plan.shape import Cluster

    terms = predict(shape, settings, Cluster(1, comm.world_size(), backend="gloo")).memory["gradient"]
    parameters = list(base.module.parameters())
    samples = [{"input_ids": s["input_ids"] * 8, "labels": s["labels"] * 8} for s in models.samples(8)]
    samples = [{key: value[:TOKENS] for key, value in sample.items()} for sample in samples]
    batch = gradient.deal_micro_batches(samples, 1, "token", 2 if settings.init.halves else 1, 0)
    held = [p.ds_tensor for p in parameters] + [p.data for p in parameters] + list(base.module.buffers())
    peaks = []
    with TensorBytes(held) as counted:
        for group in pairs.layer_groups(targets, settings.init.layer_groups):
            counted.peak = counted.live
            # The phase alone: the SVDs of 84 layers behind it would take most of the time.
            pairs.gradients(base, group, settings, batch, lambda label, done, total: None)
            peaks.append(counted.peak)
    return max(peaks), terms


@pytest.fixture(scope="module")
def measured(large_folder, tmp_path_factory):
    """What each rank has measured, by number of ranks: all cases of a number in one launch."""
    folder = tmp_path_factory.mktemp("measured")
    stock = json.loads(Path("ds_configs/zero3.json").read_text())["zero_optimization"]
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {**stock, "stage3_max_reuse_distance": 0}}))

    @functools.cache
    def by_ranks(world_size: int):
        raws = [
            config_of(large_folder, groups, parts == 2, folder / "zero.json")
            for ranks, groups, parts in CASES
            if ranks == world_size
        ]
        return run_ranks(world_size, load_and_differentiate, raws)

    return by_ranks


@pytest.mark.parametrize(("world_size", "groups", "parts"), CASES)
def test_peak_memory(world_size, groups, parts, measured):
    place = [case for case in CASES if case[0] == world_size].index((world_size, groups, parts))
    for rank, cases in enumerate(measured(world_size)):
        load_peak, shard, peak, terms = cases[place]
        named = sum(terms.values())
        print(f"{world_size} ranks, {groups} groups, {parts} parts, rank {rank}, MiB:")
        print(f"  load: peak {load_peak / MIB:.0f}, own shard {shard / MIB:.0f}, ratio {load_peak / shard:.2f}")
        print(f"  gradient: peak {peak / MIB:.0f}, named {named / MIB:.0f}, ratio {peak / named:.2f}")
        print("  terms: " + ", ".join(f"{name} {value / MIB:.0f}" for name, value in terms.items()))
        assert load_peak <= 1.3 * shard
        assert peak <= 1.1 * named, "the terms say what there is: no more"
    fullest = max(cases[place][2] for cases in measured(world_size))
    assert 0.9 * named <= fullest, "and no less, of the fullest rank"


def load_alone(folders: list[Path], zero_json: Path) -> list[tuple[int, int]]:
    """Runs on a rank: host peak of the load of each base, and the rank's own shard."""
    from lora_one_dist.base import loading
    from lora_one_dist.base.files import weight_files
    from lora_one_dist.base.skeleton import build_skeleton, fp8_block
    from lora_one_dist.base.sources import find_sources
    from lora_one_dist.config.settings import DeepSpeedConfig, ModelConfig

    found = []
    for folder in folders:
        settings = ModelConfig(path=str(folder), dtype="fp32")
        skeleton = build_skeleton(settings, folder)
        sources = find_sources(weight_files(folder, False), skeleton, fp8_block(folder, str(folder)))
        plan = loading.Plan(folder, skeleton, [], sources.parts)
        reset_host_peak()
        before = host_bytes("VmRSS")
        base = loading.load(settings, DeepSpeedConfig(config=str(zero_json)), plan, 1)
        found.append((host_bytes() - before, 4 * sum(p.ds_tensor.numel() for p in base.module.parameters())))
        del base, plan, skeleton
        gc.collect()
    return found


@pytest.fixture(scope="module")
def other_folders(large_folder, tmp_path_factory) -> list[Path]:
    """Experts that are merged and renamed, and 8-bit floats with a scale a block."""
    sizes = {"vocab_size": WORDS, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 11}
    merged, eight = tmp_path_factory.mktemp("merged"), tmp_path_factory.mktemp("eight")
    config = MixtralConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, num_local_experts=8)
    model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 140e6
    model.save_pretrained(merged, max_shard_size="400MB")
    held = {name: tensor for path in large_folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name in [name for name in held if name.endswith("_proj.weight")]:
        m, n = held[name].shape
        held[f"{name}_scale_inv"] = torch.full((-(-m // 128), -(-n // 128)), 0.01)
        held[name] = held[name].mul(100).to(torch.float8_e4m3fn)
    save_file(held, eight / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((large_folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (eight / "config.json").write_text(json.dumps(described))
    return [merged, eight]


@pytest.mark.parametrize("world_size", [2, 4])
def test_peak_memory_of_a_load_through_fusions_and_of_8_bits(world_size, other_folders):
    for rank, loads in enumerate(run_ranks(world_size, load_alone, other_folders, Path("ds_configs/zero3.json"))):
        for what, (peak, shard) in zip(("merged experts", "8 bits"), loads, strict=True):
            print(f"{world_size} ranks, rank {rank}, {what}: peak {peak / MIB:.0f} MiB, {peak / shard:.2f} x own shard")
            assert peak <= 1.3 * shard
