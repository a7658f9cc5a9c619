"""Files to parameters: renamed, prefixed, merged, fused and 8-bit checkpoints, each parameter read in three slices."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CodeGenConfig, GPTJConfig, MixtralConfig, OlmoHybridConfig

from lora_one_dist.base import loading, sharding
from lora_one_dist.base.skeleton import ModelError, build_skeleton
from lora_one_dist.base.sources import find_sources
from lora_one_dist.config.settings import LoraConfig, ModelConfig
from tests.base.checkpoints import changed, ids
from tests.ranks import run_ranks

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = ["linear_attention", "full_attention"]
# Twelve experts: by their names as text, 10 and 11 stand before 2.
FUSED = {
    "experts merged": lambda: MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=12, head_dim=8),
    "convolutions concatenated": lambda: OlmoHybridConfig(
        **SMALL,
        pad_token_id=0,
        eos_token_id=2,
        layer_types=LAYERS,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
    ),
}
SINES = {
    "gptj": lambda: GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=2048),
    "codegen": lambda: CodeGenConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=2048),
}


def saved(config, folder, dtype="float32"):
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def in_slices(parts, shape, dtype, ranks=3):
    """A tensor read as so many ranks read their partitions."""
    count = torch.Size(shape).numel()
    share, slices = -(-count // ranks), []
    with contextlib.ExitStack() as stack:
        paths = {source.path for part in parts for source in part.sources}
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        for rank in range(ranks):
            own = SimpleNamespace(data=torch.full((share,), float("nan"), dtype=dtype), ds_numel=share)
            held = SimpleNamespace(ds_tensor=own, ds_numel=count, ds_zero_partition_rank=rank)
            sharding._read_own(held, parts, files)
            slices.append(own.data)
    return torch.cat(slices)[:count].view(shape)


@pytest.mark.parametrize("kind", FUSED)
def test_fused_parameters_are_what_transformers_makes_of_the_files(kind, tmp_path):
    folder = saved(FUSED[kind](), tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    skeleton = build_skeleton(ModelConfig(path=str(folder), dtype="fp32"), folder)
    found = find_sources(files, skeleton)
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    stored = {name for path in files for name in load_file(path)}
    assert any(name not in stored for name in found.parts), "some are not in the files under their names"
    assert any(len(parts) > 2 for parts in found.parts.values())
    assert found.parts.keys() == truth.keys()
    for name, parts in found.parts.items():
        assert torch.equal(in_slices(parts, truth[name].shape, torch.float32), truth[name]), name


@pytest.mark.parametrize("kind", SINES)
def test_computed_buffers_are_those_of_from_pretrained(kind, tmp_path):
    """By ``from_config`` in bf16 they would be computed in bf16: at position 2048 a sine is off by 0.8."""
    folder = saved(SINES[kind](), tmp_path)
    settings = ModelConfig(path=str(folder), dtype="bf16", attn_implementation="eager")
    found = dict(build_skeleton(settings, folder).named_buffers())
    truth = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_buffers())
    assert found.keys() == truth.keys()
    for name, buffer in truth.items():
        assert torch.equal(found[name], buffer), name


# ---------------------------------------------------------------- 8-bit floats

BLOCK = (16, 16)


def in_fp8(folder, tmp_path):
    """A copy whose projections are 8-bit floats with a scale a block, and the values that they stand for."""
    values = {}

    def quantised(held):
        found = {}
        for name, W in held.items():
            found[name] = values[name] = W
            if name.endswith("_proj.weight"):
                m, n = (-(-size // by) for size, by in zip(W.shape, BLOCK, strict=True))
                padded = torch.zeros(m * BLOCK[0], n * BLOCK[1])
                padded[: W.shape[0], : W.shape[1]] = W
                blocks = padded.view(m, BLOCK[0], n, BLOCK[1])
                scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
                eight = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
                exact = (eight.float() * scale[:, None, :, None]).view(padded.shape)
                values[name] = exact[: W.shape[0], : W.shape[1]].contiguous()
                found[name] = eight.view(padded.shape)[: W.shape[0], : W.shape[1]].contiguous()
                found[f"{name}_scale_inv"] = scale
        return found

    described = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    return changed(folder, tmp_path, quantised, quantization_config=described), values


def logits(folders):
    """Runs on a rank: the logits of each folder under ZeRO-3, all by slices."""
    from tests import models

    found = []
    for folder in folders:
        settings = ModelConfig(path=str(folder), dtype="fp32", recompute="none")
        planned = loading.plan(folder, settings, LoraConfig(r=4), 4)
        assert planned.sources is not None
        base = loading.load(settings, models.deepspeed_config("zero3", "node"), planned, 1)
        with torch.no_grad():
            found.append(base.module.eval()(input_ids=ids()).logits)
    return found


def test_8_bit_floats_are_read_as_the_values_that_they_stand_for(model_folder, tmp_path, monkeypatch):
    folder, values = in_fp8(model_folder("llama"), tmp_path)
    monkeypatch.setattr(sharding, "SLAB_BYTES", 100)  # slabs that end inside rows
    planned = loading.plan(folder, ModelConfig(path=str(folder), dtype="fp32"), LoraConfig(r=4), 4)
    assert planned.notes == ()
    for name, parts in planned.sources.items():
        assert torch.equal(in_slices(parts, values[name].shape, torch.float32), values[name]), name
        half = in_slices(parts, values[name].shape, torch.bfloat16)
        assert torch.equal(half, values[name].bfloat16()), "rounded once"
    assert sum(part.scales is not None for parts in planned.sources.values() for part in parts) == 4 * 7
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]
    (plain / "config.json").write_text(json.dumps(described))
    assert AutoConfig.from_pretrained(plain).model_type == "llama"
    for eight, exact in run_ranks(2, logits, [folder, plain]):
        assert torch.equal(eight, exact)


@pytest.mark.parametrize(
    ("block", "message"),
    [([8, 16], r"8-bit floats do not fit: .*_scale_inv has the shape"), (None, r"is quantised \(fp8\).* block scales")],
)
def test_8_bit_floats_that_do_not_fit_are_refused(block, message, model_folder, tmp_path):
    folder, _ = in_fp8(model_folder("llama"), tmp_path)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"]["weight_block_size"] = block
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=message):
        loading.plan(folder, ModelConfig(path=str(folder), dtype="fp32"), LoraConfig(r=4), 4)
