"""Adapters on disk: what PEFT makes of them, the way back, and that no half-written folder is left."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_one_dist.adapters.folder import AdapterError, encode_pairs, export, read_adapter
from lora_one_dist.adapters.lora import Adapter, peft_config
from lora_one_dist.base.targets import Target
from lora_one_dist.config.reading import parse_config
from lora_one_dist.config.settings import Config
from lora_one_dist.disk import folders
from tests import models
from tests.runs import settings

R = 4
S = 6 / math.sqrt(R)
TARGETS = [
    Target("model.layers.0.self_attn.v_proj", 16, 32, R, S),
    Target("model.layers.0.mlp.down_proj", 32, 72, R, S),
]
PREFIX = "base_model.model.model.layers.0."  # PEFT's, before the names of a transformers model


@pytest.fixture
def config(model_folder, tmp_path):
    def build(**changes) -> Config:
        folder = model_folder("llama")
        lora = {"lora__r": R, "lora__alpha": 6, "lora__target_modules": ["v_proj", "down_proj"]}
        return parse_config(settings(folder, tmp_path / "run", **{**lora, **changes}))

    return build


def pairs(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        t.name: (torch.randn(R, t.n, generator=generator), torch.randn(t.m, R, generator=generator)) for t in TARGETS
    }


def adapters(seed: int, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    values = pairs(seed)
    weight = nn.Parameter(torch.empty(0))  # nothing here may read it
    return [Adapter(t, *(nn.Parameter(value.to(dtype)) for value in values[t.name]), weight) for t in TARGETS]


@pytest.mark.parametrize("begun", [True, False], ids=["some are pruned", "at the start"])
def test_adalora_is_plain_lora_of_the_triplets_that_stay(begun, config, tmp_path):
    kind = {"lora__kind": "adalora", "lora__use_rslora": False, "init__method": "lora", "optim__preconditioner": None}
    described, diagonals = config(**kind), ([0.0, 0.5, 0.0, -2.0], [0.0] * R)
    s = described.scaling
    made = [
        replace(
            adapter,
            target=replace(adapter.target, kind="adalora", scaling=s),
            more={"lora_E": nn.Parameter(torch.tensor(E) * begun)},
        )
        for adapter, E in zip(adapters(0), diagonals, strict=True)
    ]
    export(tmp_path / "adapter", described, made, [adapter.target for adapter in made], None)
    base = AutoModelForCausalLM.from_pretrained(described.model.path)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for adapter, count in zip(made, (2, 1) if begun else (R, R), strict=True):
        layer = model.base_model.model.get_submodule(adapter.target.name)
        assert layer.r["default"] == count
        expected = s * adapter.B @ adapter.more["lora_E"].diag() @ adapter.A
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)


def in_every_layer(r: int) -> list[Target]:
    """The targets of all layers of the model."""
    named = [(i, t, t.name.partition(".0.")[2]) for i in range(4) for t in TARGETS]
    return [Target(f"model.layers.{i}.{name}", t.m, t.n, r, S) for i, t, name in named]


def described(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_export_holds_the_pairs_under_pefts_names_in_their_dtype(dtype, config, tmp_path):
    settings = config()
    export(tmp_path / "adapter", settings, adapters(0, dtype), TARGETS, None)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {
        f"{PREFIX}{name}.lora_{side}.weight": pairs(0)[f"model.layers.0.{name}"][side == "B"].to(dtype)
        for name in ("self_attn.v_proj", "mlp.down_proj")
        for side in "AB"
    }
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], expected[name]) for name in expected)
    found = described(tmp_path / "adapter")
    assert (found["r"], found["lora_alpha"], found["use_rslora"], found["bias"]) == (R, 6, True, "none")
    assert set(found["target_modules"]) == {"v_proj", "down_proj"}
    assert (found["base_model_name_or_path"], found["inference_mode"]) == (settings.model.path, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compensated_export_is_of_rank_2r_in_fp32(dtype, config, tmp_path):
    initial = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in pairs(1).items()}
    export(tmp_path / "adapter", config(), adapters(0, dtype), TARGETS, initial)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert described(tmp_path / "adapter")["r"] == 2 * R
    for target in TARGETS:
        A, B = (value.to(dtype).float() for value in pairs(0)[target.name])
        A0, B0 = (value.float() for value in initial[target.name])
        found = [tensors[f"base_model.model.{target.name}.lora_{side}.weight"] for side in "AB"]
        assert [tuple(tensor.shape) for tensor in found] == [(2 * R, target.n), (target.m, 2 * R)]
        assert torch.equal(found[0], torch.cat([A, A0])), "fp32 values of what the run computed with"
        assert torch.equal(found[1], torch.cat([B, -B0], dim=1))


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("compensated", [True, False])
def test_peft_adds_s_times_the_change_to_the_untouched_base(rslora, compensated, config, tmp_path):
    settings = config(lora__use_rslora=rslora)
    initial = pairs(1) if compensated else None
    export(tmp_path / "adapter", settings, adapters(0), TARGETS, initial)
    loaded = PeftModel.from_pretrained(models.llama(layers=1), tmp_path / "adapter")
    scaling = 6 / R**0.5 if rslora else 6 / R
    for target in TARGETS:
        A, B = (value.double() for value in pairs(0)[target.name])
        expected = B @ A
        if initial is not None:
            A0, B0 = (value.double() for value in initial[target.name])
            expected = expected - B0 @ A0
        found = loaded.get_submodule(f"base_model.model.{target.name}").get_delta_weight("default")
        # fp32 sums of 8 terms
        assert (found - scaling * expected).abs().max() <= 1e-5 * expected.abs().max()


def test_wrong_shape_is_a_bug_and_stops_before_anything_is_written():
    description = PeftLoraConfig(r=R, target_modules=["v_proj", "down_proj"])
    wrong = pairs(0)
    A, B = wrong[TARGETS[1].name]
    for pair in ((A.T, B), (A, B.T), (A[:-1], B[:, :-1])):
        with pytest.raises(AssertionError, match=r"mlp.down_proj: shapes"):
            encode_pairs(description, {**wrong, TARGETS[1].name: pair}, TARGETS)


def test_older_adapter_and_leftovers_are_replaced_as_a_whole(config, tmp_path):
    folder = tmp_path / "deep" / "adapter"
    folder.parent.mkdir()
    export(folder, config(), adapters(0), TARGETS, None)
    (folder / "stale.bin").touch()
    leftover = folder.with_name(".adapter.partial")
    leftover.mkdir()
    (leftover / "half.bin").touch()
    export(folder, config(), adapters(2), TARGETS, None)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    assert not (folder / "stale.bin").exists()
    assert not (folder / "half.bin").exists()
    assert torch.equal(read_adapter(folder, config(), TARGETS).pairs[TARGETS[0].name][0], pairs(2)[TARGETS[0].name][0])


def test_older_adapter_survives_a_write_that_fails(config, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    export(folder, config(), adapters(0), TARGETS, None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(path, content):
        path.write_bytes(content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "_write_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(folder, config(), adapters(2), TARGETS, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_gives_back_what_was_written_in_fp32(dtype, config, tmp_path):
    export(tmp_path / "adapter", config(), adapters(0, dtype), TARGETS, None)
    found = read_adapter(tmp_path / "adapter", config(), TARGETS).pairs
    assert found.keys() == pairs(0).keys()
    for name, written in pairs(0).items():
        for tensor, value in zip(found[name], written, strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, value.to(dtype).float())


def test_read_takes_what_peft_saved(config, tmp_path):
    settings = config()
    torch.manual_seed(0)
    description = peft_config(settings.lora, TARGETS, "x", init_lora_weights=False)  # a random B
    wrapped = PeftModel(models.llama(layers=1), description)
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    found = read_adapter(tmp_path / "adapter", settings, TARGETS).pairs
    for target in TARGETS:
        layer = wrapped.get_submodule(f"base_model.model.{target.name}")
        assert torch.equal(found[target.name][0], layer.lora_A["default"].weight)
        assert torch.equal(found[target.name][1], layer.lora_B["default"].weight)


A_NAME = f"{PREFIX}self_attn.v_proj.lora_A.weight"
B_NAME = f"{PREFIX}mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        ({"r": 8}, "r is 8, the run's is 4"),
        ({"lora_alpha": 16}, "lora_alpha is 16, the run's is 6.0"),
        ({"use_rslora": False}, "use_rslora is False, the run's is True"),
        ({"use_rslora": ...}, "use_rslora is None, the run's is True"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        (
            {"rank_pattern": {"v_proj": 2}},
            "rank_pattern is {'v_proj': 2}, which gives model.layers.0.self_attn.v_proj r 2",
        ),
        (
            {"alpha_pattern": {"v_proj": 2}},
            "alpha_pattern is {'v_proj': 2}, which gives model.layers.0.self_attn.v_proj ",
        ),
        ({"rank_pattern": {"v_proj(": 2}}, "rank_pattern is {'v_proj(': 2}, must map patterns to numbers"),
        ({"alpha_pattern": {"v_proj": None}}, "alpha_pattern is {'v_proj': None}, must map patterns to numbers"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, the run's layers hold weights (out, in)"),
        ({A_NAME: None}, f"{A_NAME} is missing"),
        ({A_NAME: torch.zeros(4, 31)}, f"{A_NAME} is (4, 31), must be (4, 32)"),
        ({B_NAME: torch.zeros(4, 32)}, f"{B_NAME} is (4, 32), must be (32, 4)"),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
            "1 of its tensors belong to no target, e.g. bas",
        ),
        ({A_NAME.replace("lora_A", "lora_magnitude_vector"): torch.zeros(4)}, "1 of its tensors belong to no target"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapter_that_does_not_fit_is_refused(altered, message, config, tmp_path):
    folder = tmp_path / "adapter"
    export(folder, config(), adapters(0), TARGETS, None)
    alter(folder, altered)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, config(), TARGETS)
    expected = f"init.adapter = {folder}: {message}"
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith(". Set lora.* to what the adapter was made with.")
    assert "; " not in str(caught.value), "one difference, one problem"


def alter(folder: Path, altered: dict) -> None:
    """Change settings (... removes one) and tensors (None removes one) of an adapter."""
    tensors, found = load_file(folder / "adapter_model.safetensors"), described(folder)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for key, value in altered.items():
        held = tensors if key.startswith("base_model.") else found
        held[key] = value
        if value is None or value is ...:
            del held[key]
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not supported (merge it with"),
        ({"trainable_token_indices": [4]}, "trainable_token_indices is [4], which is not supported (merge it with"),
        ({"bias": "all", "lora_bias": True}, "lora_bias is True, which is not supported (merge it with"),
        ({"resized": 70}, "base_model.model.lm_head.weight was saved whole, and cannot be trained on yet (merge it wi"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changed the base: the adapter does not ho"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora, which changed the base: the adapter does not ho"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of resized embeddings and biases that are lacking
def test_adapters_of_peft_that_cannot_be_trained_on(settings, message, config, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    if "resized" in settings:
        model.resize_token_embeddings(settings["resized"], mean_resizing=False)
    changes = {key: value for key, value in settings.items() if key != "resized"}
    description = peft_config(config().lora, TARGETS, str(model_folder("llama")), **changes)
    PeftModel(model, description).save_pretrained(str(tmp_path / "adapter"))
    targets = in_every_layer(R)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "adapter", config(), targets)
    assert str(caught.value).startswith(f"init.adapter = {tmp_path / 'adapter'}: {message}")
    remedy = "path_initial_model_for_weight_conversion" if "init_lora_weights" in settings else "tools/merge_adapter.py"
    assert remedy in str(caught.value)


def test_converted_pissa_is_read_at_twice_the_rank(config, model_folder, tmp_path):
    """What PEFT converted holds on this base: what is added to a weight is what PEFT's live model has more than it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    before = {t.name: model.get_submodule(t.name).weight.detach().clone() for t in TARGETS}
    wrapped = PeftModel(model, peft_config(config().lora, TARGETS, "x", init_lora_weights="pissa"))
    wrapped.save_pretrained(str(tmp_path / "start"))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    layers = {t.name: wrapped.get_submodule(f"base_model.model.{t.name}") for t in TARGETS}
    change = {n: x.base_layer.weight + x.get_delta_weight("default") - before[n] for n, x in layers.items()}
    at = str(tmp_path / "start")
    wrapped.save_pretrained(str(tmp_path / "adapter"), path_initial_model_for_weight_conversion=at)
    doubled = config(lora__r=2 * R, lora__alpha=6 * math.sqrt(2))
    targets = in_every_layer(2 * R)
    found = read_adapter(tmp_path / "adapter", doubled, targets).pairs
    for name, expected in change.items():
        A, B = found[name]
        torch.testing.assert_close(6 / math.sqrt(R) * (B @ A), expected, rtol=0, atol=1e-5)  # fp32 sums of 8 terms


def test_every_difference_is_told_at_once_up_to_five(config, tmp_path):
    folder, wider = tmp_path / "adapter", [replace(target, r=8, scaling=2.0) for target in TARGETS]
    export(folder, config(), adapters(0), TARGETS, None)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, config(lora__r=8, lora__alpha=16, lora__use_rslora=False), wider)
    shown = str(caught.value).split(": ", 1)[1]
    assert shown == (
        "r is 4, the run's is 8; lora_alpha is 6.0, the run's is 16.0; use_rslora is True, the run's is False; "
        f"{A_NAME} is (4, 32), must be (8, 32); {A_NAME.replace('lora_A', 'lora_B')} is (16, 4), must be (16, 8); "
        "and 2 more. Set lora.* to what the adapter was made with."
    )


def test_adapter_in_another_format_is_refused(config, tmp_path):
    folder = tmp_path / "adapter"
    export(folder, config(), adapters(0), TARGETS, None)
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"holds no adapter_model.safetensors. Save it as such"):
        read_adapter(folder, config(), TARGETS)


def test_damaged_adapter_is_named(config, tmp_path):
    folder = tmp_path / "adapter"
    export(folder, config(), adapters(0), TARGETS, None)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
        read_adapter(folder, config(), TARGETS)
    for text in ("{", "[1]"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read"):
            read_adapter(folder, config(), TARGETS)
