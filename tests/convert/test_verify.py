"""Two checkpoints of any format: the largest difference that is reported is the one that was planted."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_one_dist.commands import verify
from lora_one_dist.convert import compare, export, files, merge
from lora_one_dist.disk.lazy import ConversionError
from tests import models, tool

PROMPTS = ["w5 w9 w17", "w40 w8"]


def adapted(base: Path, out: Path, **settings: object) -> Path:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out)
    return out


@pytest.fixture
def pair(model_folder, tmp_path):
    """A base, an adapter and a copy of it."""
    base = model_folder("llama")
    first = adapted(base, tmp_path / "first")
    return base, first, shutil.copytree(first, tmp_path / "second")


def change(folder: Path, name: str, index: tuple[int, ...], by: float) -> None:
    """Add to one number of the tensor whose name ends so."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if key.endswith(name):
                tensor[index] += by
        save_file(tensors, path, metadata={"format": "pt"})


def test_equal_adapters(pair):
    base, first, second = pair
    found = compare.compare(compare.open_any(first), compare.open_any(second))
    assert found.equal()
    assert found.compared == 4 * 2 * 2
    assert verify.main([str(first), str(second), "--base", str(base), "--prompt", PROMPTS[0]]) == 0


def test_names_the_largest_difference_and_its_place(pair, capsys):
    _, first, second = pair
    change(second, "layers.2.mlp.down_proj.lora_A.weight", (3, 70), 0.25)
    change(second, "layers.0.self_attn.q_proj.lora_B.weight", (5, 1), -0.125)
    assert verify.main([str(first), str(second)]) == verify.DIFFERENT
    lines = capsys.readouterr().out.splitlines()
    assert "largest difference: 0.25 in model.layers.2.mlp.down_proj.lora_A.weight[3, 70]; tolerance 0" in lines
    assert "14 of 16 tensors are equal bit for bit" in lines
    assert verify.main([str(first), str(second), "--tolerance", "0.26"]) == 0
    assert verify.main([str(first), str(second), "--tolerance", "0.24"]) == verify.DIFFERENT


def test_another_scale_is_another_adapter(pair):
    base, first, _ = pair
    other = adapted(base, first.parent / "scaled", lora_alpha=16)
    found = compare.compare(compare.open_any(first), compare.open_any(other))
    assert not found.differences
    assert not found.equal()
    assert found.structure[0] == "the scale of model.layers.0.mlp.down_proj is 2 and 4"


def test_other_names_types_and_shapes(pair):
    base, first, _ = pair
    other = adapted(base, first.parent / "fewer", target_modules=["q_proj"], r=3, lora_alpha=6)
    found = compare.compare(compare.open_any(first), compare.open_any(other))
    assert sum("only" in line and "down_proj" in line for line in found.structure) == 8
    assert "model.layers.1.self_attn.q_proj.lora_A.weight is (4, 32) and (3, 32)" in found.structure
    export.run(export.plan(first, dtype=torch.bfloat16), first.parent / "rounded")
    rounded = compare.compare(compare.open_any(first), compare.open_any(first.parent / "rounded"))
    assert any("is torch.float32 and torch.bfloat16" in line for line in rounded.structure)


def test_models_and_their_logits(pair, tmp_path, capsys):
    """A merged model against another merge of the same, and against its base."""
    base, first, second = pair
    for adapter, out in ((first, "a"), (second, "b")):
        merge.run(merge.plan(base, adapter), tmp_path / out)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert verify.main([*both, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    assert f"every file has the hash of {files.CHECKSUMS}" in capsys.readouterr().out
    assert verify.main([both[0], str(base), "--prompt", PROMPTS[0], "--tolerance", "0.001"]) == verify.DIFFERENT
    x, y = (AutoModelForCausalLM.from_pretrained(f)(torch.tensor([[1, 5, 9, 17]])).logits for f in (both[0], base))
    assert f"logits: {(x - y).abs().max().item():9.3g}" in capsys.readouterr().out


def test_adapters_of_different_rank_that_compute_the_same(pair, tmp_path):
    """Zero columns change every shape and nothing that is computed: only logits can tell."""
    base, first, second = pair
    padded = {
        name: torch.cat([t, torch.zeros_like(t)], 0 if "lora_A" in name else 1)
        for name, t in load_file(second / "adapter_model.safetensors").items()
    }
    save_file(padded, second / "adapter_model.safetensors", metadata={"format": "pt"})
    config = second / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8').replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert verify.main([str(first), str(second)]) == verify.DIFFERENT
    logits = [str(first), str(second), "--base", str(base), "--prompt", PROMPTS[0], "--tolerance", "1e-5"]
    assert verify.main(logits) == 0  # fp32 sums of the same products and zeros, in another order


NEW = [f"<{i}>" for i in range(6)]
ROWS = {"trainable_token_indices": {name: [*range(64, 70)] for name in ("embed_tokens", "lm_head")}}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of resized embeddings
@pytest.mark.parametrize("trained", [{"modules_to_save": ["lm_head"]}, ROWS], ids=["whole", "rows"])
def test_adapter_with_a_larger_vocabulary(trained, model_folder, tmp_path):
    """Its logits are those of its merge, which is tested against PEFT's; its tokenizer's new tokens are among them."""
    base, tokenizer = model_folder("llama"), models.tokenizer("llama")
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(70, mean_resizing=False)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **trained)
    get_peft_model(larger, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=trained is not ROWS)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge.run(merge.plan(base, tmp_path / "adapter"), tmp_path / "merged")
    adapter, merged = (compare.open_any(tmp_path / name) for name in ("adapter", "merged"))
    (x,), (y,) = (
        compare.logits(opened, below, [f"w5 {NEW[3]} w9"], torch.float64)
        for opened, below in ((adapter, base), (merged, None))
    )
    assert x.shape == (4, 70)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)  # of up to 20: merged weights and norms are rounded to fp32


def test_numbers_that_are_none():
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1.0, nan, inf], [inf, 2.0, nan]])
    assert compare.largest_difference(x, x.clone().double()) == (0.0, ())
    assert compare.largest_difference(x, torch.tensor([[1.5, nan, inf], [inf, 2.0, nan]])) == (0.5, (0, 0))
    assert compare.largest_difference(x, torch.tensor([[1.5, nan, inf], [inf, 2.0, 3.0]])) == (inf, (1, 2))
    assert compare.largest_difference(x, torch.tensor([[1.0, nan, inf], [-inf, 2.0, nan]])) == (inf, (1, 0))


def test_large_tensors_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(compare, "PART", 7)
    x = torch.arange(60.0).view(4, 15)
    y = x.clone()
    y[2, 11] += 3
    y[0, 1] -= 2
    assert compare.largest_difference(x, y) == (3.0, (2, 11))


def test_wrong_inputs(pair, tmp_path):
    base, first, _ = pair
    merge.run(merge.plan(base, first), tmp_path / "merged")
    with pytest.raises(ConversionError, match="compare two adapters or two models"):
        compare.compare(compare.open_any(first), compare.open_any(tmp_path / "merged"))
    change(tmp_path / "merged", "norm.weight", (0,), 1.0)
    with pytest.raises(ConversionError, match=f"is not what {files.CHECKSUMS} says"):
        compare.open_any(tmp_path / "merged")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="is no run folder, no checkpoint and no PEFT folder"):
        compare.open_any(tmp_path / "empty")
    with pytest.raises(ConversionError, match="Give its --base"):
        compare.logits(compare.open_any(first), None, PROMPTS, torch.float32)


def test_command_line(pair):
    _, first, second = pair
    command = [sys.executable, "tools/verify.py", str(first), str(second)]  # once in a process of its own
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    change(second, "layers.0.self_attn.q_proj.lora_A.weight", (0, 0), 1.0)
    assert tool.run("verify", first, second, check=False).returncode == verify.DIFFERENT
    shutil.rmtree(second)
    failed = tool.run("verify", first, second, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
