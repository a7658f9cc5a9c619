"""ZeRO checkpoints of HF Trainer + PEFT become the adapter that the live model held, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one_dist.convert import files, merge, zero, zero_checkpoint
from lora_one_dist.disk.lazy import ConversionError
from tests import ranks, tool

VOCABULARY = 70  # of the resized one
STAGES = [1, 2, 3]
LAYOUTS = ["checkpoint-2", "plain", "accelerate"]
WORLD_SIZES = [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(4, marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    """What one job of N ranks saved: a folder for each stage."""
    made: dict[int, Path] = {}

    def at(world_size: int) -> Path:
        if world_size not in made:
            out = tmp_path_factory.mktemp("zero") / str(world_size)
            script = ["tests/peers/zero_checkpoints.py", str(world_size), str(model_folder("llama")), str(out)]
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
            env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(
                [sys.executable, *script], env={**env, **where}, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, done.stderr[-3000:]
            made[world_size] = out
        return made[world_size]

    return at


def generated(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    prompt = torch.tensor([[5, 9, 17, 3], [40, 12, 6, 8]])
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_has_the_bits_of_the_live_model(world_size, stage, saved, model_folder, tmp_path):
    root = saved(world_size) / f"stage-{stage}"
    live = load_file(root / "live" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in live.values()), "B is zero: nothing was trained"
    for layout in LAYOUTS:
        given = None if layout == "checkpoint-2" else root / "live" / "adapter_config.json"
        planned = zero.plan(root / layout, adapter_config=given)
        zero.run(planned, tmp_path / layout)
        found = load_file(tmp_path / layout / "adapter_model.safetensors")
        assert found.keys() == live.keys()
        for name, tensor in live.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), (layout, name)
        assert files.wrong_checksums(tmp_path / layout) == []
    ours, theirs = (generated(model_folder("llama"), f) for f in (tmp_path / "checkpoint-2", root / "live"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", STAGES)
def test_inferred_configuration(stage, saved, model_folder, tmp_path):
    """Without adapter_config.json: the adapter computes the same, and lora_alpha must be given."""
    root = saved(2) / f"stage-{stage}"
    with pytest.raises(ConversionError, match=r"no adapter_config\.json in it or above\. Give .*--lora_alpha"):
        zero.plan(root / "plain")
    planned = zero.plan(root / "plain", lora_alpha=6)
    assert any("inferred from the tensors" in note for note in planned.notes)
    zero.run(planned, tmp_path / "out")
    assert torch.equal(
        generated(model_folder("llama"), tmp_path / "out"), generated(model_folder("llama"), root / "live")
    )


def test_resized_vocabulary_merges_to_what_peft_computes(saved, model_folder, tmp_path):
    """Trained under ZeRO-3: PEFT saves an embedding as X and as X.modules_to_save, the optimizer once."""
    root, base = saved(2) / "resized", model_folder("llama")
    zero.run(planned := zero.plan(root / "checkpoint-2"), tmp_path / "adapter")
    assert planned.notes[-1] == f"tokenizer: copied from {root / 'checkpoint-2'}"
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    live = PeftModel.from_pretrained(larger, root / "live").double().eval()
    ids = torch.arange(3, VOCABULARY - 1).view(2, 33)
    for adapter, twice in ((tmp_path / "adapter", False), (root / "checkpoint-2", True), (root / "live", True)):
        names = load_file(adapter / "adapter_model.safetensors").keys()
        assert any(".modules_to_save." in name for name in names) is twice
        out = tmp_path / "merged" / adapter.parent.name / adapter.name
        merge.run(merge.plan(base, adapter), out)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
        assert merged.config.vocab_size == VOCABULARY
        distance = (merged(ids).logits - live(ids).logits).abs().max().item()
        print(f"{adapter.name}: {distance:.1e}")
        assert distance <= 1e-5  # weights and norms are rounded to fp32
        assert len(AutoTokenizer.from_pretrained(out)) == (VOCABULARY if adapter.name != "live" else 64)


def test_masters_are_finer_than_the_model(saved):
    folder = saved(2) / "stage-3" / "checkpoint-2"
    model, masters = zero.plan(folder), zero.plan(folder, dtype=torch.float32)
    differ = 0
    for name, tensor in masters.tensors.items():
        values = tensor.read()
        assert values.dtype == torch.float32
        assert torch.equal(values.bfloat16(), model.tensors[name].read())
        differ += int((values != values.bfloat16().float()).sum())
    assert differ > 0


def test_wrappers_and_a_second_adapter(saved):
    opened = zero_checkpoint.open_checkpoint(saved(2) / "stage-1" / "plain")
    plain, name = zero.adapter_tensors(opened)
    assert name == "default"
    wrapped = {f"module.{name}": tensor for name, tensor in opened.tensors.items()}
    second = {name.replace(".default", ".second"): tensor for name, tensor in opened.tensors.items()}
    both = zero_checkpoint.Checkpoint(opened.folder, 1, 2, 2, wrapped | second)
    with pytest.raises(ConversionError, match="adapters default, second"):
        zero.adapter_tensors(both)
    with pytest.raises(ConversionError, match="--adapter_name third"):
        zero.adapter_tensors(both, "third")
    assert zero.adapter_tensors(both, "default")[0].keys() == plain.keys()


class Evil:
    def __reduce__(self):
        return (os.system, ("false",))


def rewrite(path: Path, change) -> None:
    """Save a file again after a change of its content."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[-1]


def drop_lora(content) -> None:
    for group in content["param_shapes"]:
        for name in list(group):
            group[name.replace("lora_", "lola_").replace("modules_to_save", "saved")] = group.pop(name)
    content["module"] = {
        n.replace("lora_", "lola_").replace("modules_to_save", "saved"): t for n, t in content["module"].items()
    }


FAULTS = {
    "a rank's optimizer": (3, lambda f: one(f, "*rank_1*optim*").unlink(), r"has 1 \*_optim_states\.pt, must have 2"),
    "rank 0's optimizer": (3, lambda f: one(f, "*rank_0_*optim*").unlink(), "the file of rank 0 .* is missing"),
    "a rank's model": (3, lambda f: one(f, "*rank_1*model*").unlink(), r"has 1 \*_model_states\.pt, must have 2"),
    "no model": (2, lambda f: one(f, "*model*").unlink(), r"holds no \*_model_states\.pt"),
    "no optimizer": (
        2,
        lambda f: [p.unlink() for p in f.glob("*optim*")],
        r"neither \*_optim_states|no \*_optim_states",
    ),
    "one more rank": (
        2,
        lambda f: shutil.copy(one(f, "*rank_1*optim*"), f / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        r"has 3 \*_optim_states\.pt, must have 2",
    ),
    "tensor parallel": (
        2,
        lambda f: shutil.copy(one(f, "*model*"), f / "mp_rank_01_model_states.pt"),
        "tensor parallel",
    ),
    "model of another step": (
        3,
        lambda f: rewrite(one(f, "*rank_1*model*"), lambda c: c.update(global_steps=7)),
        r"are of the steps \[2, 7\]",
    ),
    "optimizer of another step": (
        1,
        lambda f: rewrite(
            one(f, "*rank_1*optim*"),
            lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"].fill_(9),
        ),
        r"are of the steps \[2, 9\]",
    ),
    "other number of ranks": (
        1,
        lambda f: rewrite(one(f, "*model*"), lambda c: c.update(dp_world_size=4)),
        "optimizer is of 2 ranks, its model of 4",
    ),
    "other weights": (
        2,
        lambda f: rewrite(
            one(f, "*rank_1*optim*"),
            lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data.add_(1),
        ),
        "is another in the optimizer than in the model",
    ),
    "fewer numbers": (
        3,
        lambda f: rewrite(
            one(f, "*rank_1*optim*"),
            lambda c: c["optimizer_state_dict"].update(
                fp32_flat_groups=[c["optimizer_state_dict"]["fp32_flat_groups"][0][:99].clone()]
            ),
        ),
        "optimizer holds 99 numbers",
    ),
    "no LoRA": (2, lambda f: rewrite(one(f, "*model*"), drop_lora), "nothing that was trained is of LoRA"),
    "cut short": (2, lambda f: one(f, "*model*").write_bytes(b"PK" + b"x" * 500), "cannot be read"),
    "code": (
        2,
        lambda f: rewrite(one(f, "*model*"), lambda c: c.update(more=Evil())),
        "names .*system, which could run",
    ),
    "other shape": (
        2,
        lambda f: (f.parent / "adapter_config.json").write_text(
            (f.parent / "adapter_config.json").read_text().replace('"r": 5', '"r": 6')
        ),
        "r is 6",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_checkpoints_are_refused_and_leave_nothing(fault, saved, tmp_path):
    stage, breaking, message = FAULTS[fault]
    folder = shutil.copytree(saved(2) / f"stage-{stage}" / "checkpoint-2", tmp_path / "checkpoint-2")
    zero.plan(folder)
    breaking(folder / "global_step2")
    with pytest.raises(ConversionError, match=message):
        zero.run(zero.plan(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_wrong_folders(saved, tmp_path):
    root = saved(2) / "stage-1"
    for folder, tag, message in [
        (tmp_path / "none", None, "is no folder"),
        (tmp_path, None, "nor a file latest"),
        (root / "plain", "first", "there is no such checkpoint"),
        (root / "plain", "../accelerate", "there is no such checkpoint"),
    ]:
        with pytest.raises(ConversionError, match=message):
            zero.plan(folder, tag)


def test_command_line(saved, tmp_path):
    source = saved(2) / "stage-2" / "checkpoint-2"
    command = ["zero_to_peft", source, "--out", tmp_path / "out", "--dtype", "fp32"]
    assert "ZeRO-2 of 2 ranks, step 2, adapter default" in tool.run(*command, "--dry_run").stdout
    assert not (tmp_path / "out").exists()
    tool.run(*command)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").popitem()[1].dtype == torch.float32
    again = tool.run(*command, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    tool.run("zero_to_peft", source, "--out", tmp_path / "model")
    assert "24 of 24 tensors are equal" in tool.run("verify", source, tmp_path / "model").stdout
    loaded = "import sys; sys.argv = ['x', '--help']; sys.path.insert(0, '.'); import tools.zero_to_peft; "
    loaded += "assert not {'deepspeed', 'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", loaded], check=True)
