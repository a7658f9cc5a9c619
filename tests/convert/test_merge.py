"""Merging against PEFT's merge_and_unload, and against the live model where PEFT's merge changes what it computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora_one_dist.convert import files, merge
from lora_one_dist.disk.lazy import ConversionError, LazyTensor, write_safetensors
from lora_one_dist.disk.weights import WeightsError
from tests import models, tool

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 43).view(2, 20)
VARIANTS = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 7}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 7, r"layers\.[12]\.mlp\.up_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "down_proj": 32},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embedding_dora": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True}),
    "fan_in_fan_out_dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "regex": ("llama", {"target_modules": r".*layers\.[13]\..*(gate|o)_proj"}),
    "tied": ("qwen2", {"target_modules": LINEAR}),
}


def gpt2() -> torch.nn.Module:
    torch.manual_seed(13)
    # No dimension but c_proj's of the attention is square: both readings of a square weight are tried.
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=3, n_head=4, tie_word_embeddings=False)
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a base by kind and dtype, in several shards."""
    root = tmp_path_factory.mktemp("bases")

    def folder(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{kind}-{dtype}".replace("torch.", "")
        if not path.exists():
            model = gpt2() if kind == "gpt2" else models.MODELS[kind]()
            model.to(dtype).save_pretrained(path, max_shard_size="20KB")
            models.tokenizer(kind).save_pretrained(path)
        return path

    return folder


def adapted(base: Path, settings: dict, seed: int = 5) -> PeftModel:
    """A live model with an adapter whose every tensor is random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    torch.manual_seed(seed)
    live = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return live.eval()


def merged_state(model: PeftModel) -> dict[str, torch.Tensor]:
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_has_the_bits_of_pefts_merge(variant, bases, tmp_path):
    kind, settings = VARIANTS[variant]
    base = bases(kind)
    live = adapted(base, settings)
    live.save_pretrained(tmp_path / "adapter")
    merge.run(merge.plan(base, tmp_path / "adapter"), tmp_path / "merged")
    assert files.wrong_checksums(tmp_path / "merged") == []
    logits = live(IDS).logits
    expected = merged_state(live)
    found = {n: t for shard in files.model_shards(tmp_path / "merged").values() for n, t in shard.items()}
    assert found.keys() == {n: t for shard in files.model_shards(base).values() for n, t in shard.items()}.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.read(), expected[name]), name
    changed = sum(
        not torch.equal(t.read(), found[n].read()) for s in files.model_shards(base).values() for n, t in s.items()
    )
    assert changed > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-4, atol=1e-4)  # sums in another order, fp32


def units_in_the_last_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How many bf16 numbers lie between two: their bits as integers that grow with the number."""

    def ordered(t):
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(x) - ordered(y)).abs()


@pytest.mark.parametrize(
    "variant", ["plain", "rslora", "patterns", "dora", "modules_to_save", "fan_in_fan_out", "tied"]
)
def test_bf16_is_the_rounded_exact_sum(variant, bases, tmp_path):
    """PEFT rounds the delta to bf16 before it adds; we round once, so we are never further from the exact sum."""
    kind, settings = VARIANTS[variant]
    base = bases(kind, torch.bfloat16)
    live = adapted(base, settings)
    live.save_pretrained(tmp_path / "adapter")
    merge.run(merge.plan(base, tmp_path / "adapter"), tmp_path / "merged")
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    exact, theirs = merged_state(exact), merged_state(live)
    distances = []
    found = {n: t.read() for shard in files.model_shards(tmp_path / "merged").values() for n, t in shard.items()}
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16()), name
        our_error, their_error = (tensor.float() - exact[name]).norm(), (theirs[name].float() - exact[name]).norm()
        assert our_error <= their_error, name
        distances.append(units_in_the_last_place(tensor, theirs[name]).flatten())
    apart = torch.cat(distances).float()
    share, most = (apart > 0).float().mean(), apart.sort().values[int(0.99 * len(apart))]
    print(
        f"{variant}: {share:.1%} of {len(apart)} numbers differ from PEFT's; 99 % by at most {most:.0f} units in the "
        f"last place, where base and delta cancel by up to {apart.max():.0f}"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["lora on embedding", "lora on head", "head saved", "embedding saved", "kept tied"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of its own merge here
def test_tied_embeddings_compute_what_the_adapted_model_does(settings, bases, tmp_path):
    """PEFT's merge would change both uses of a shared tensor; the truth is the live model before it."""
    base = bases("qwen2")
    live = adapted(base, settings)
    live.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    merge.run(merge.plan(base, tmp_path / "adapter"), tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(IDS % 15).logits, again(IDS % 15).logits, rtol=1e-4, atol=1e-4)
    kept = bool(settings.get("ensure_weight_tying"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is kept


def test_base_without_its_prefix(bases, tmp_path):
    """gpt2 on the hub has h.0.attn..., what transformers makes of it transformer.h.0.attn..."""
    base = shutil.copytree(bases("gpt2"), tmp_path / "bare")
    live = adapted(bases("gpt2"), {"target_modules": ["c_attn"], "fan_in_fan_out": True})
    live.save_pretrained(tmp_path / "adapter")
    shards = files.model_shards(base)
    bare = {f: {n.removeprefix("transformer."): t for n, t in s.items()} for f, s in shards.items()}
    (tmp_path / "renamed").mkdir()
    files.copy_rest(base, tmp_path / "renamed")
    files.write_model(tmp_path / "renamed", bare)
    planned = merge.plan(tmp_path / "renamed", tmp_path / "adapter")
    assert any("transformer." in note for note in planned.notes)
    merge.run(planned, tmp_path / "merged")
    expected = merged_state(live)
    held = {n: t for shard in files.model_shards(tmp_path / "merged").values() for n, t in shard.items()}
    assert torch.equal(held["h.1.attn.c_attn.weight"].read(), expected["transformer.h.1.attn.c_attn.weight"])


def test_several_workers_write_the_same_bits(bases, tmp_path):
    live = adapted(bases("llama"), VARIANTS["plain"][1])
    live.save_pretrained(tmp_path / "adapter")
    for workers in (1, 3):
        merge.run(merge.plan(bases("llama"), tmp_path / "adapter"), tmp_path / f"{workers}", workers)
    assert (tmp_path / "1" / files.CHECKSUMS).read_text() == (tmp_path / "3" / files.CHECKSUMS).read_text()


@pytest.fixture
def good(bases, tmp_path):
    """A base and an adapter of its own, to break."""
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    adapted(base, VARIANTS["plain"][1]).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(folder: Path, *endings: str) -> None:
    tensors = {
        n: LazyTensor(t.dtype, tuple(t.shape), t.clone)
        for n, t in load_file(folder / "adapter_model.safetensors").items()
    }
    (folder / "adapter_model.safetensors").unlink()
    write_safetensors(
        folder / "adapter_model.safetensors", {n: t for n, t in tensors.items() if not n.endswith(endings)}
    )


FAULTS = {
    "shard": (lambda b, a: next(b.glob("*-00003-of-*")).unlink(), r"00003-of-\d+\.safetensors: missing"),
    "cut shard": (lambda b, a: next(b.glob("*-00003-of-*")).write_bytes(b"x" * 99), "is no safetensors file"),
    "no weights": (lambda b, a: [p.unlink() for p in b.glob("*.safetensors*")], "holds neither"),
    "other model": (lambda b, a: change_config(a, r=5), "r is 5"),
    "layer lost": (lambda b, a: drop(a, "layers.2.mlp.up_proj.lora_A.weight"), r"layers\.2\.mlp\.up_proj lacks lora_A"),
    "pair lost": (
        lambda b, a: drop(a, "2.mlp.up_proj.lora_A.weight", "2.mlp.up_proj.lora_B.weight"),
        r"targets model\.layers\.2\.mlp\.up_proj and holds nothing",
    ),
    "quantised": (lambda b, a: change_config(b, quantization_config={"bits": 4}), "is quantised"),
    "pissa": (lambda b, a: change_config(a, init_lora_weights="pissa_niter_4"), "init_lora_weights is pissa"),
    "unknown": (lambda b, a: change_config(a, use_qalora=True), "use_qalora is True, which is not supported"),
    "bias": (lambda b, a: change_config(a, bias="some"), "bias is some, must be none or all or lora_only"),
    "prompt": (lambda b, a: change_config(a, peft_type="PROMPT_TUNING"), "peft_type is PROMPT_TUNING"),
    "no config": (lambda b, a: (a / "adapter_config.json").unlink(), r"holds no adapter_config\.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_inputs_are_refused_and_leave_nothing(fault, good, tmp_path):
    base, adapter = good
    breaking, message = FAULTS[fault]
    breaking(base, adapter)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ConversionError, WeightsError), match=message):
        merge.run(merge.plan(base, adapter), tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_adapter_of_another_model(good, bases, tmp_path):
    with pytest.raises(ConversionError, match=r"qwen2.*is not the base of .*: model\.layers"):
        merge.plan(bases("qwen2"), good[1])


def test_existing_folder_and_full_disk(good, tmp_path, monkeypatch):
    base, adapter = good
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConversionError, match="is there already"):
        merge.run(merge.plan(base, adapter), tmp_path / "merged")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConversionError, match="has 1 bytes free"):
        merge.run(merge.plan(base, adapter), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_write_that_fails_half_way_leaves_nothing(good, tmp_path, monkeypatch):
    base, adapter = good
    written = []

    def failing(path, tensors, done):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_bytes(b"part")

    monkeypatch.setattr(files, "write_safetensors", failing)
    with pytest.raises(ConversionError, match=r"merged: cannot be written: No space left on device\. Nothing was kept"):
        merge.run(merge.plan(base, adapter), tmp_path / "merged")
    assert len(written) == 3
    assert not list(tmp_path.glob("*merged*"))


def test_command_line(good, tmp_path):
    base, adapter = good
    command = ["merge_adapter", base, adapter, "--out", tmp_path / "merged"]
    assert "28 layers of rank 4 are added" in tool.run(*command, "--dry_run").stdout
    assert not (tmp_path / "merged").exists()
    tool.run(*command)
    subprocess.run(["sha256sum", "-c", "--quiet", files.CHECKSUMS], cwd=tmp_path / "merged", check=True)
    again = tool.run(*command, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
