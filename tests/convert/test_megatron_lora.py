"""PEFT's adapters in Megatron-Bridge's layouts and back: the same bits, and what Bridge's own classes compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_one_dist.adapters import peft_format
from lora_one_dist.convert import compare, files, megatron, megatron_files, megatron_lora, megatron_model
from lora_one_dist.disk.lazy import ConversionError
from tests import tool
from tests.megatron import IDS, VOCABULARY, Jobs, save

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "shared": {"r": 8, "lora_alpha": 16, "target_modules": ALL},  # one A for q, k and v, one for gate and up
    "qv": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05},
    "rslora": {"r": 6, "lora_alpha": 16, "target_modules": ALL, "use_rslora": True},
    "layers": {"r": 4, "lora_alpha": 4, "target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1, 3]},
    "ranks": {"r": 8, "lora_alpha": 16, "target_modules": ALL, "rank_pattern": {"q_proj": 4, "up_proj": 2}}
    | {"alpha_pattern": {"q_proj": 8, "up_proj": 4}},
    "scales": {"r": 8, "lora_alpha": 16, "target_modules": ALL, "rank_pattern": {"q_proj": 4, "down_proj": 6}},
}
FORMS = list(megatron_lora.CLASSES)
PARALLEL = [(1, 1), (2, 2), (4, 1)]
FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "megatron_bridge_lora.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Function: a base model's folder and that of an adapter on it, all of whose numbers are random."""
    root = tmp_path_factory.mktemp("adapters")

    def made(name: str, family: str = "llama3") -> tuple[Path, Path]:
        base, adapter = root / family, root / f"{family}-{name}"
        if not base.exists():
            save(family, base)
        if not adapter.exists():
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**ADAPTERS[name]))
            generator = torch.Generator().manual_seed(7)
            state = dict(model.named_parameters())
            for parameter in (p for n, p in state.items() if "lora_" in n):
                parameter.data.normal_(0, 0.1, generator=generator)
            if name == "shared":
                for target in list(state):
                    for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                        if f"{first}.lora_A" in target:
                            for other in others:
                                state[target.replace(first, other)].data.copy_(state[target].data)
            model.save_pretrained(adapter)
        return base, adapter

    return made


def there(adapter: Path, base: Path, out: Path, tp: int = 1, pp: int = 1, form: str = "canonical") -> Path:
    megatron_lora.run_to_megatron(megatron_lora.plan_to_megatron(adapter, base, tp, pp, form), out)
    return out


def back(checkpoint: Path, out: Path, hf: Path | None = None) -> Path:
    megatron_lora.run_to_peft(megatron_lora.plan_to_peft(checkpoint, hf), out)
    return out


def same(first: Path, second: Path) -> bool:
    found = compare.compare(compare.open_any(first), compare.open_any(second))
    return found.equal() and found.compared > 0


def products(folder: Path) -> dict[str, torch.Tensor]:
    """scale B A of every layer, in fp64."""
    layers = peft_format.open_folder(folder).layers
    return {n: x.scale * x.B.read().double() @ x.A.read().double() for n, x in layers.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "scales"])
@pytest.mark.parametrize(("tp", "pp"), PARALLEL)
def test_there_and_back_has_the_same_bits(name, form, tp, pp, folders, tmp_path):
    base, adapter = folders(name)
    out = there(adapter, base, tmp_path / "megatron", tp, pp, form)
    assert same(adapter, back(out, tmp_path / "peft"))
    assert files.wrong_checksums(out) == files.wrong_checksums(tmp_path / "peft") == []
    kept = [json.loads((folder / peft_format.CONFIG).read_text()) for folder in (adapter, tmp_path / "peft")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("form", FORMS)
def test_one_alpha_for_different_scales(form, folders, tmp_path):
    """Bridge multiplies every layer by one alpha / dim; what differs from it is in B, rounded to fp32."""
    base, adapter = folders("scales")
    expected = products(adapter)
    found = products(back(there(adapter, base, tmp_path / "megatron", 2, 1, form), tmp_path / "peft"))
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        torch.testing.assert_close(found[name], product, rtol=2e-7, atol=1e-8)  # B is rounded by 6e-8 of itself
        assert product.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["all", "shared", "layers"])
def test_fused_layout(name, folders, tmp_path):
    """What a fused adapter adds to linear_qkv and linear_fc1 is what the separate ones add, fused as weights are."""
    base, adapter = folders(name)
    expected = products(adapter)
    checkpoint = there(adapter, base, tmp_path / "megatron", 2, 1, "fused")
    opened = megatron_files.open_checkpoint(checkpoint)
    peft = yaml.safe_load((checkpoint / "release" / "run_config.yaml").read_text())["peft"]
    assert peft["dim"] == {"all": 24, "shared": 8, "layers": 4}[name]
    assert peft["alpha"] == {"all": 48, "shared": 16, "layers": 4}[name]
    checked = 0
    for i in range(4):
        for module, groups, rows in (("self_attention.linear_qkv", 4, (64, 32, 32)), ("mlp.linear_fc1", 1, (96, 96))):
            prefix = f"decoder.layers.{i}.{module}.adapter.linear_"
            if prefix + "in.weight" not in opened.tensors:
                continue
            A, B = (opened.tensors[f"{prefix}{side}.weight"].read().double() for side in ("in", "out"))
            parts = [hf for _, _, hf in megatron_lora.MODULES[module]]
            none = [torch.zeros(n, 64, dtype=torch.float64) for n in rows]
            separate = [expected.get(f"model.layers.{i}.{hf}", zero) for hf, zero in zip(parts, none, strict=True)]
            fused = peft["alpha"] / peft["dim"] * B @ A
            torch.testing.assert_close(fused, megatron.join(separate, groups), rtol=0, atol=1e-15)
            checked += 1
    assert checked == {"all": 8, "shared": 8, "layers": 4}[name]


@pytest.mark.parametrize("form", FORMS)
def test_names_and_shapes_are_bridges(form, folders):
    base, adapter = folders("shared")
    planned = megatron_lora.plan_to_megatron(adapter, base, 1, 1, form)
    assert {name: list(tensor.shape) for name, tensor in planned.tensors.items()} == FIXTURE[
        megatron_lora.CLASSES[form]
    ]
    assert planned.run_config["peft"]["_target_"] == megatron_lora.CLASSES[form]
    assert planned.run_config["peft"]["dim"] == FIXTURE["dim"]


def case(name: str, form: str, tp: int, pp: int = 1, family: str = "llama3"):
    """The job of each TP and PP takes seconds of imports."""
    return pytest.param(name, form, tp, pp, family, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def jobs(folders, request, tmp_path_factory):
    def checkpoints(name: str, form: str, tp: int, pp: int, family: str, folder: Path) -> list[Path]:
        base, adapter = folders(name, family)
        megatron_model.run_to_megatron(megatron_model.plan_to_megatron(base, tp, pp), folder / "base")
        return [folder / "base" / "release", there(adapter, base, folder / "megatron", tp, pp, form) / "release"]

    root = tmp_path_factory.mktemp("jobs")
    return Jobs("megatron_bridge", test_bridge_computes_the_same, checkpoints, request.session, root)


@pytest.mark.parametrize(
    ("name", "form", "tp", "pp", "family"),
    [case(name, form, tp) for name in ("all", "qv") for form in FORMS for tp in (1, 2)]
    + [case("shared", "fused", 2), case("scales", "canonical", 2), case("rslora", "canonical", 2)]
    + [case("all", "canonical", 2, 2), case("all", "canonical", 2, family="qwen3")],
)
def test_bridge_computes_the_same(name, form, tp, pp, family, folders, jobs, request, tmp_path):
    """Bridge's classes load what we wrote; their logits are PEFT's, merged or not, and what they save we read."""
    base, adapter = folders(name, family)
    out = jobs.out(request.node.callspec.id)
    if pp == 1:
        plain = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            without = plain(IDS).logits
            model = PeftModel.from_pretrained(plain, adapter)
            expected = model(IDS).logits
            merged = model.merge_and_unload()(IDS).logits
        logits = torch.load(out / "logits.pt")[..., :VOCABULARY]
        assert (expected - without).abs().max() > 0.1, "the adapter does nothing that could be seen"
        for wanted in (expected, merged):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)  # fp32, other order of sums
        print(f"{name} {form} TP {tp}: logits differ from PEFT's by {(logits - expected).abs().max():.2g}")
    shutil.copy(adapter / peft_format.CONFIG, base)
    try:
        returned = back(out / "saved", tmp_path / "peft", base)
    finally:
        (base / peft_format.CONFIG).unlink()
    if name == "scales":
        assert products(returned).keys() == products(adapter).keys()
    else:
        assert same(adapter, returned)


TO_MEGATRON = {
    "tp": ({}, {"tp": 3}, "--tp 3: does not divide the 8 heads"),
    "pp": ({}, {"pp": 3}, "--pp 3: does not divide the 4 layers"),
    "dora": ({"use_dora": True}, {}, "it is a DoRA"),
    "whole": ({"modules_to_save": ["lm_head"]}, {}, r"lm_head.weight was trained whole"),
    "head": ({"target_modules": ["lm_head"]}, {}, "lm_head is no linear layer of this model's blocks"),
}


@pytest.mark.parametrize("fault", TO_MEGATRON)
def test_adapters_without_a_place_are_refused(fault, folders, tmp_path):
    base, _ = folders("all")
    options, settings, message = TO_MEGATRON[fault]
    config = LoraConfig(**{**ADAPTERS["qv"], **options})
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConversionError, match=message):
        megatron_lora.plan_to_megatron(tmp_path / "adapter", base, **{"tp": 1, "pp": 1, **settings})


def test_adapter_of_another_model_is_refused(folders):
    base, _ = folders("all")
    _, other = folders("all", "mistral")
    with pytest.raises(ConversionError, match=r"q_proj is on a layer of \(128, 64\), the model has \(64, 64\)"):
        megatron_lora.plan_to_megatron(other, base, 1, 1)


def change(folder: Path, **changes: object) -> None:
    path = folder / "release" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: {**config[key], **changes.get(key, {})} for key in config}))


TO_PEFT = {
    "missing file": (lambda f: next(f.glob("release/*.distcp")).unlink(), r"\.distcp: missing"),
    "no run_config": (lambda f: (f / "release" / "run_config.yaml").unlink(), "has no run_config.yaml"),
    "broken run_config": (lambda f: (f / "release" / "run_config.yaml").write_text("peft: ["), "that make sense"),
    "other dim": (lambda f: change(f, peft={"dim": 16}), r"peft.dim is 16, the adapters' is \[8\]"),
    "no alpha": (lambda f: change(f, peft={"alpha": None}), "that make sense"),
    "tp": (lambda f: change(f, model={"tensor_model_parallel_size": 0}), "that make sense"),
    "no config": (lambda f: shutil.rmtree(f / "hf"), "Give --hf"),
}


@pytest.mark.parametrize("fault", TO_PEFT)
def test_checkpoints_that_do_not_fit_are_refused(fault, folders, tmp_path):
    breaking, message = TO_PEFT[fault]
    base, adapter = folders("all")
    folder = there(adapter, base, tmp_path / "megatron")
    megatron_lora.plan_to_peft(folder)
    breaking(folder)
    with pytest.raises(ConversionError, match=message):
        megatron_lora.plan_to_peft(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_other_base_other_kind_and_model_are_refused(folders, tmp_path, monkeypatch):
    base, adapter = folders("all")
    other, _ = folders("all", "mistral")
    folder = there(adapter, base, tmp_path / "megatron")
    with pytest.raises(ConversionError, match=r"adapter_k is .*\(32, 8\); .* says .*\(64, 8\)"):
        megatron_lora.plan_to_peft(folder, other)
    megatron_model.run_to_megatron(megatron_model.plan_to_megatron(base, 1, 1), tmp_path / "model")
    with pytest.raises(ConversionError, match=r"run_config\.yaml|holds no adapters"):
        megatron_lora.plan_to_peft(tmp_path / "model")
    opened = megatron_files.open_checkpoint(folder)
    opened.tensors["decoder.layers.0.mlp.linear_fc2.adapter.weight_magnitude"] = next(iter(opened.tensors.values()))
    monkeypatch.setattr(megatron_files, "open_checkpoint", lambda _: opened)
    with pytest.raises(ConversionError, match="weight_magnitude is of no adapter that PEFT has"):
        megatron_lora.plan_to_peft(folder)


def test_full_disk_and_failing_write(folders, tmp_path, monkeypatch):
    base, adapter = folders("all")
    planned = megatron_lora.plan_to_megatron(adapter, base, 1, 1)
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(ConversionError, match="has 1 bytes free"):
            megatron_lora.run_to_megatron(planned, tmp_path / "full")

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(megatron_files.FileSystemWriter, "finish", failing)
    with pytest.raises(ConversionError, match=r"No space left on device\. Nothing was kept"):
        megatron_lora.run_to_megatron(planned, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_lines(folders, tmp_path):
    base, adapter = folders("qv")
    there = ["peft_to_megatron", adapter, "--base", base, "--out", tmp_path / "m"]
    dry = tool.run(*there, "--form", "fused", "--dry_run")
    assert "LoRA(dim=16, alpha=32, target_modules=['linear_qkv'])" in dry.stdout
    assert "4 adapters share no A: laid out in blocks at dim 16" in dry.stdout
    assert not (tmp_path / "m").exists()
    done = tool.run(*there, "--tp", 2)
    assert "CanonicalLoRA(dim=8, alpha=16, target_modules=['linear_q', 'linear_k', 'linear_v'])" in done.stdout
    assert "4 layers without an adapter get one of zeros" in done.stdout
    here = ["megatron_to_peft", tmp_path / "m", "--out", tmp_path / "peft"]
    tool.run(*here)
    assert "16 of 16 tensors are equal" in tool.run("verify", tmp_path / "m", adapter).stdout
    again = tool.run(*here, check=False)
    assert again.returncode == 1
    assert "is there already" in again.stderr
