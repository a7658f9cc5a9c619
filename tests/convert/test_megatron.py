"""Hugging Face models in Megatron-core's format and back: the same bits, and what Megatron's own model computes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_one_dist.convert import compare, files, megatron, megatron_files, megatron_model
from lora_one_dist.disk.lazy import ConversionError, LazyTensor
from tests import tool
from tests.megatron import FAMILIES, IDS, VOCABULARY, Jobs, save

DTYPES = {"llama2": torch.float16, "llama3": torch.bfloat16, "mistral": torch.bfloat16}
PARALLEL = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Folder of a small model of a family."""
    root = tmp_path_factory.mktemp("hf")

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{str(dtype).rpartition('.')[2]}"
        return path if path.exists() else save(family, path, dtype)

    return folder


def converted(folder: Path, out: Path, tp: int = 1, pp: int = 1) -> Path:
    megatron_model.run_to_megatron(megatron_model.plan_to_megatron(folder, tp, pp), out)
    return out


def back(checkpoint: Path, out: Path, hf: Path | None = None) -> Path:
    megatron_model.run_to_hf(megatron_model.plan_to_hf(checkpoint, hf), out)
    return out


def same(first: Path, second: Path) -> bool:
    found = compare.compare(compare.open_any(first), compare.open_any(second))
    return found.equal() and found.compared > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), PARALLEL)
def test_there_and_back_has_the_same_bits(family, tp, pp, hf, tmp_path):
    source = hf(family, DTYPES.get(family, torch.float32))
    out = converted(source, tmp_path / "megatron", tp, pp)
    opened = megatron_files.open_checkpoint(out)
    assert opened.tensors[megatron.EMBEDDING].shape[0] == {1: 384, 2: 512, 4: 512}[tp]
    assert opened.arguments["tensor_model_parallel_size"], opened.arguments["pipeline_model_parallel_size"] == (tp, pp)
    assert same(source, back(out, tmp_path / "hf"))
    assert files.wrong_checksums(out) == files.wrong_checksums(tmp_path / "hf") == []
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


def test_layout_of_the_fused_tensors(hf, tmp_path):
    """Against a naive loop over heads: group by group its queries, its key, its value; gate above up; zeros below."""
    source = hf("qwen2")
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    opened = megatron_files.open_checkpoint(converted(source, tmp_path / "megatron", 2))
    for kind in ("weight", "bias"):
        q, k, v = (state[f"model.layers.3.self_attn.{side}_proj.{kind}"] for side in "qkv")
        rows = []
        for group in range(4):
            rows += [*q[group * 16 : group * 16 + 16], *k[group * 8 : group * 8 + 8], *v[group * 8 : group * 8 + 8]]
        fused = opened.tensors[f"decoder.layers.3.self_attention.linear_qkv.{kind}"].read()
        assert torch.equal(fused, torch.stack(rows))
    mlp = opened.tensors["decoder.layers.1.mlp.linear_fc1.weight"].read()
    assert torch.equal(mlp[:96], state["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(mlp[96:], state["model.layers.1.mlp.up_proj.weight"])
    embedding = opened.tensors[megatron.EMBEDDING].read()
    assert torch.equal(embedding[:VOCABULARY], state["model.embed_tokens.weight"])
    assert not embedding[VOCABULARY:].any()


def once(family: str, tp: int, pp: int):
    """The default suite runs one of these: the job of each TP and PP takes seconds of imports."""
    return pytest.param(family, tp, pp, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def jobs(hf, request, tmp_path_factory):
    def checkpoints(family: str, tp: int, pp: int, folder: Path) -> list[Path]:
        return [converted(hf(family), folder / "megatron", tp, pp) / "release"]

    root = tmp_path_factory.mktemp("jobs")
    return Jobs("megatron_gpt", test_megatron_computes_the_same, checkpoints, request.session, root)


@pytest.mark.parametrize(
    ("family", "tp", "pp"),
    [once(family, tp, 1) for family in FAMILIES for tp in (1, 2)] + [once("llama3", 1, 2), once("qwen3", 2, 2)],
)
def test_megatron_computes_the_same(family, tp, pp, hf, jobs, request, tmp_path):
    """Megatron-core loads what we wrote, strictly; its logits are transformers', and what it saves we read."""
    source = hf(family)
    out = jobs.out(request.node.callspec.id)
    if pp == 1:
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(IDS).logits
        logits = torch.load(out / "logits.pt")
        assert logits.shape[-1] == {1: 384, 2: 512}[tp]
        assert expected.abs().max() > 1, "too small to tell a wrong layout from rounding"
        torch.testing.assert_close(logits[..., :VOCABULARY], expected, rtol=0, atol=1e-4)  # fp32, other order of sums
        apart = (logits[..., :VOCABULARY] - expected).abs().max()
        print(f"{family} TP {tp}: logits differ from transformers' by {apart:.2g}")
    assert same(source, back(out / "saved", tmp_path / "hf", source))


def without(folder: Path, ending: str) -> None:
    """Take a tensor out of a model."""
    shards = files.model_shards(folder)
    kept = {n: t.read() for s in shards.values() for n, t in s.items() if not n.endswith(ending)}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    lazy = {n: LazyTensor(t.dtype, tuple(t.shape), t.clone) for n, t in kept.items()}
    files.write_model(folder, files.shard(lazy), say=lambda _: None)


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


TO_MEGATRON = {
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), {}, "safetensors: missing"),
    "missing tensor": (lambda f: without(f, "2.mlp.up_proj.weight"), {}, r"has no model\.layers\.2\.mlp\.up_proj"),
    "tp": (lambda f: None, {"tp": 3}, "--tp 3: does not divide the 8 heads"),
    "tp beyond the groups": (lambda f: None, {"tp": 8}, "--tp 8: does not divide the 4 key/value heads"),
    "pp": (lambda f: None, {"pp": 3}, "--pp 3: does not divide the 4 layers"),
    "vocabulary": (
        lambda f: set_config(f, vocab_size=299),
        {},
        "embed_tokens.weight has 300 rows, config.json says vocab_size 299",
    ),
    "layers": (lambda f: set_config(f, num_hidden_layers=3), {}, r"model\.layers\.3.* has no place"),
    "heads": (lambda f: set_config(f, num_key_value_heads=2), {}, r"linear_qkv\.weight is .*, must be"),
    "family": (lambda f: set_config(f, model_type="gpt2"), {}, "model_type is gpt2, must be one of"),
    "rope": (
        lambda f: set_config(f, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        {},
        "rope_type is yarn",
    ),
    "biases": (lambda f: set_config(f, mlp_bias=True), {}, "mlp_bias is True"),
}


@pytest.mark.parametrize("fault", TO_MEGATRON)
def test_models_that_do_not_fit_are_refused(fault, hf, tmp_path):
    breaking, settings, message = TO_MEGATRON[fault]
    folder = shutil.copytree(hf("llama3"), tmp_path / "hf")
    breaking(folder)
    with pytest.raises(ConversionError, match=message):
        megatron_model.plan_to_megatron(folder, **{"tp": 1, "pp": 1, **settings})
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def other_backend(folder: Path) -> None:
    (folder / "release" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def evil_metadata(folder: Path) -> None:
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))


TO_HF = {
    "missing file": (lambda f: (f / "release" / "__0_0.distcp").unlink(), r"__0_0\.distcp: missing"),
    "cut file": (lambda f: cut(f / "release" / "__0_0.distcp"), r"__0_0\.distcp: has \d+ bytes, must have"),
    "no metadata": (lambda f: (f / "release" / ".metadata").unlink(), r"holds no \.metadata"),
    "broken metadata": (lambda f: cut(f / "release" / ".metadata"), "cannot be read|is not of a distributed"),
    "evil metadata": (evil_metadata, "is not of a distributed checkpoint"),
    "other format": (other_backend, "format is zarr, must be torch_dist"),
    "no tracker": (lambda f: (f / megatron_files.TRACKER).unlink(), "has neither"),
    "larger vocabulary": (lambda f: set_config(f / "hf", vocab_size=600), "has 384 rows, config.json says 600"),
    "smaller vocabulary": (lambda f: set_config(f / "hf", vocab_size=200), "would be padded to 256"),
    "other layers": (lambda f: set_config(f / "hf", num_hidden_layers=5), r"has no decoder\.layers\.4"),
    "other width": (lambda f: set_config(f / "hf", intermediate_size=128), r"linear_fc1\.weight is .*, must be"),
    "tied": (lambda f: set_config(f / "hf", tie_word_embeddings=True), r"it has output_layer\.weight"),
    "no config": (lambda f: shutil.rmtree(f / "hf"), "Give --hf"),
}


@pytest.mark.parametrize("fault", TO_HF)
def test_checkpoints_that_do_not_fit_are_refused(fault, hf, tmp_path):
    breaking, message = TO_HF[fault]
    folder = converted(hf("llama3"), tmp_path / "megatron")
    megatron_model.plan_to_hf(folder)
    breaking(folder)
    with pytest.raises(ConversionError, match=message):
        megatron_model.plan_to_hf(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
    assert not Path("evil").exists()


def test_unknown_names_in_the_arguments_do_nothing(hf, tmp_path):
    """Real ones hold classes of Megatron's; here one that would run a command."""
    folder = converted(hf("qwen3"), tmp_path / "megatron")
    common = {"args": Namespace(tensor_model_parallel_size=1, make_vocab_size_divisible_by=128, backend=Evil())}
    torch.save(common, folder / "release" / "common.pt")
    assert same(hf("qwen3"), back(folder, tmp_path / "hf"))
    assert not Path("evil").exists()


def test_full_disk_existing_folder_and_failing_write(hf, tmp_path, monkeypatch):
    planned = megatron_model.plan_to_megatron(hf("llama3"), 1, 1)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConversionError, match="is there already"):
        megatron_model.run_to_megatron(planned, tmp_path / "there")
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(ConversionError, match="has 1 bytes free"):
            megatron_model.run_to_megatron(planned, tmp_path / "full")

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(megatron_files.FileSystemWriter, "finish", failing)
    with pytest.raises(ConversionError, match=r"No space left on device\. Nothing was kept"):
        megatron_model.run_to_megatron(planned, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_several_files(hf, tmp_path, monkeypatch):
    """Large models are written in files of a few gigabytes, cut between tensors."""
    monkeypatch.setattr(files, "SHARD_BYTES", 10**5)
    (tmp_path / "release").mkdir()
    planned = megatron_model.plan_to_megatron(hf("qwen2"), 4, 1)
    megatron_files.write(
        tmp_path / "release", planned.tensors, lambda n: megatron.pieces(n, 4), planned.arguments, max_bytes=10**5
    )
    assert len(list((tmp_path / "release").glob("*.distcp"))) > 4
    assert same(hf("qwen2"), back(tmp_path / "release", tmp_path / "hf", hf("qwen2")))


def test_command_lines(hf, tmp_path):
    there = ["hf_to_megatron", hf("llama3"), "--out", tmp_path / "m", "--tp", 2]
    assert "llama, 4 layers; vocabulary 300 padded to 512" in tool.run(*there, "--dry_run").stdout
    assert not (tmp_path / "m").exists()
    tool.run(*there)
    here = ["megatron_to_hf", tmp_path / "m", "--out", tmp_path / "hf"]
    tool.run(*here, "--dry_run")
    tool.run(*here)
    assert same(hf("llama3"), tmp_path / "hf")
    assert "39 of 39 tensors are equal" in tool.run("verify", tmp_path / "m", hf("llama3")).stdout
    again = tool.run(*here, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
