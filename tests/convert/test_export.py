"""Exported adapters: the same bits, or another rank whose reported error is the one that is measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_one_dist.adapters import folder as adapters
from lora_one_dist.adapters.lora import Adapter
from lora_one_dist.base import loading
from lora_one_dist.config.settings import Config
from lora_one_dist.convert import export, files
from lora_one_dist.disk import folders
from lora_one_dist.disk.lazy import ConversionError
from lora_one_dist.run import checkpoint
from tests import tool


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture(scope="module")
def run_folder(model_folder, tmp_path_factory):
    """What a lora_ga run with two ranks leaves, made of random weights by the package's own writers."""
    base, root = model_folder("llama"), tmp_path_factory.mktemp("runs") / "ga"
    config = Config.model_validate(
        {
            "model": {"path": str(base)},
            "data": {"train": "x"},
            "lora": {"r": 4, "alpha": 7, "use_rslora": True},
            "init": {"method": "lora_ga"},
            "train": {"global_batch_size": 2},
            "output_dir": str(root),
        }
    )
    targets = loading.plan(base, config.model, config.lora, 8).targets
    generator = torch.Generator().manual_seed(3)

    def pair(target, dtype):
        A = torch.randn(4, target.n, generator=generator)
        return A.to(dtype), (torch.randn(target.m, 4, generator=generator) * 0.1).to(dtype)

    masters = {t.name: pair(t, torch.float32) for t in targets}
    initial = {t.name: pair(t, torch.float32) for t in targets}
    live = [Adapter(t, A=A.bfloat16(), B=B.bfloat16(), weight=None) for t in targets for A, B in [masters[t.name]]]
    encoded = adapters.encode(config, live, targets, initial)
    step = root / "checkpoints" / "step-20"
    step.mkdir(parents=True)
    content = {f"adapter/{name}": value for name, value in encoded.items()}
    for rank in range(2):
        own = {
            f"{t.name}.lora_{side}.master": x
            for t in targets[rank::2]
            for side, x in zip("AB", masters[t.name], strict=True)
        }
        content[f"optimizer-{rank:05d}-of-00002.safetensors"] = checkpoint.encode_tensors(own)
    content["state.json"] = json.dumps({"format": checkpoint.FORMAT, "step": 20}).encode()
    entries = {}
    for name, value in content.items():
        (step / name).parent.mkdir(exist_ok=True)
        entries[name] = folders._write_file(step / name, value)
    (step / "manifest.json").write_text(folders.manifest_text(entries))
    (root / "checkpoints" / "latest").write_text("step-20\n")
    return root, base, masters, initial


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    held = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter)
    return held.double().merge_and_unload().state_dict()


def test_exact_export_has_rank_2r_and_the_same_bits(run_folder, tmp_path):
    root, *_ = run_folder
    planned = export.plan(root)
    assert planned.r == 8
    assert export.run(planned, tmp_path / "out") == []
    assert files.wrong_checksums(tmp_path / "out") == []
    written, before = tmp_path / "out", root / "checkpoints" / "step-20" / "adapter"
    expected = load_file(before / "adapter_model.safetensors")
    found = load_file(written / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads(bytes_of(written / "adapter_config.json")) == json.loads(bytes_of(before / "adapter_config.json"))


@pytest.mark.parametrize("r", [1, 4, 7])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reported_error_is_the_measured_change_of_the_weights(r, dtype, run_folder, tmp_path):
    root, base, *_ = run_folder
    rows = {row["layer"]: row for row in export.run(export.plan(root, r, dtype), tmp_path / "out")}
    assert json.loads((tmp_path / "out" / export.REPORT).read_text()) == list(rows.values())
    original, exact = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).state_dict(),
        merged(base, root / "checkpoints/step-20/adapter"),
    )
    truncated = merged(base, tmp_path / "out")
    assert len(rows) == 28
    for name, row in rows.items():
        change = (truncated[f"{name}.weight"] - exact[f"{name}.weight"]).norm()
        whole = (exact[f"{name}.weight"] - original[f"{name}.weight"]).norm()
        # The sums are in fp64, but PEFT forms alpha / sqrt(r) from an alpha that went through JSON: 1e-15 each.
        assert row["error"] == pytest.approx(float(change), rel=1e-9)
        assert row["relative"] == pytest.approx(float(change / whole), rel=1e-9)
        if dtype is None:  # the best of that rank (Eckart-Young), up to the rounding to fp32
            spectrum = torch.linalg.svdvals(exact[f"{name}.weight"] - original[f"{name}.weight"])
            assert row["error"] == pytest.approx(float(spectrum[r:].norm()), rel=1e-5)


def test_masters_are_the_optimizers(run_folder, tmp_path):
    root, _, masters, initial = run_folder
    export.run(export.plan(root, masters=True), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, (A, B) in masters.items():
        A0, B0 = initial[name]
        assert torch.equal(found[f"base_model.model.{name}.lora_A.weight"], torch.cat([A, A0]))
        assert torch.equal(found[f"base_model.model.{name}.lora_B.weight"], torch.cat([B, -B0], 1))


def test_truncation_keeps_the_scale_and_halves_the_singular_values():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(6, 30, generator=generator), torch.randn(20, 6, generator=generator)
    A1, B1 = export.truncate(A, B, 3)
    U, S, Vh = torch.linalg.svd((B @ A).double())
    torch.testing.assert_close(B1 @ A1, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-5, atol=1e-5)  # B @ A was fp32
    torch.testing.assert_close(A1 @ A1.T, B1.T @ B1, rtol=0, atol=1e-10)
    assert export.norm_of_product(B.double(), A.double()) == pytest.approx(float(S.norm()), rel=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scale_stays(use_rslora, tmp_path, run_folder):
    root, *_ = run_folder
    folder = shutil.copytree(root / "checkpoints" / "step-20" / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": use_rslora}))
    before, after = export.plan(folder), export.plan(folder, 2)
    root_of = math.sqrt if use_rslora else float
    scales = [planned.config["lora_alpha"] / root_of(planned.config["r"]) for planned in (before, after)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-12)


def test_wrong_requests(run_folder, tmp_path):
    root, *_ = run_folder
    step = root / "checkpoints" / "step-20"
    for arguments, message in [
        ({"source": root, "r": 9}, "--rank 9: must be from 1 to 8"),
        ({"source": root, "step": 30}, "no such checkpoint. Give one of these: step-20"),
        ({"source": step, "step": 20}, "is no run folder"),
        ({"source": tmp_path}, "is no run folder, no checkpoint and no PEFT folder"),
        ({"source": step / "adapter", "masters": True}, None),
        ({"source": root, "r": 0}, "--rank 0"),
    ]:
        if message is None:
            assert export.plan(**arguments).r == 8, "an adapter inside of its checkpoint finds the optimizer"
            continue
        with pytest.raises(ConversionError, match=message):
            export.plan(**arguments)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight was trained whole \(modules_to_save\)"),
        ({"trainable_token_indices": [4]}, r"tokens of model\.embed_tokens\.weight were trained \(trainable_token_ind"),
        ({"bias": "all"}, r"0\.self_attn\.q_proj\.bias was saved whole"),
        ({"lora_bias": True}, r"0\.self_attn\.q_proj\.bias was trained \(lora_bias\)"),
    ],
)
def test_more_than_pairs_is_refused(settings, words, model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder("qwen2"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], **settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConversionError, match=rf"{words}.*not LoRA alone\. Merge it with tools/merge_adapter\.py"):
        export.plan(tmp_path / "adapter")


def test_damaged_checkpoint_is_refused(run_folder, tmp_path):
    root = shutil.copytree(run_folder[0], tmp_path / "copy")
    path = root / "checkpoints" / "step-20" / "optimizer-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"optimizer-00001-of-00002\.safetensors has other content"):
        export.plan(root)


def test_command_line(run_folder, tmp_path):
    root, *_ = run_folder
    command = ["export_adapter", root, "--rank", 4, "--dtype", "bf16", "--out", tmp_path / "out"]
    assert "rank 8 truncated to 4" in tool.run(*command, "--dry_run").stdout
    assert not (tmp_path / "out").exists()
    assert "relative      error" in tool.run(*command).stdout
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].dtype == torch.bfloat16
    again = tool.run(*command, check=False)
    assert (again.returncode, again.stderr.startswith("error: ")) == (1, True)
    assert "max-lora-rank" in tool.run("export_adapter", "--help").stdout
