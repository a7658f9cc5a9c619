"""The base's files: where each value lies in them, and which are refused before a value is read."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_one_dist.base import loading
from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.config.settings import LoraConfig, ModelConfig
from tests import models
from tests.base.checkpoints import Malicious, changed, pickled, plan, plan_of_pickle, stored
from tests.ranks import run_ranks


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plan_finds_every_value_without_reading_one(kind, model_folder):
    found = plan(model_folder(kind))
    assert all(parameter.is_meta for parameter in found.skeleton.parameters())
    truth = dict(models.MODELS[kind]().named_parameters())  # a tied weight once
    assert found.sources.keys() == truth.keys()
    assert len({part.source.path for parts in found.sources.values() for part in parts}) > 2, "in several shards"
    for name, parts in found.sources.items():
        assert torch.equal(stored(parts), truth[name].flatten()), name


def test_tied_weight_may_be_stored_under_its_other_name_or_both(model_folder, tmp_path):
    folder = model_folder("qwen2")
    head = changed(folder, tmp_path, lambda held: {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()})
    assert sum(name in ("lm_head.weight", "model.embed_tokens.weight") for name in plan(head).sources) == 1
    held = {name: tensor.clone() for name, tensor in load_file(head / "model.safetensors").items()}
    del held["model.embed_tokens.weight"]
    save_file(held, head / "model.safetensors", metadata={"format": "pt"})
    sources = plan(head).sources
    assert "lm_head.weight" in sources
    assert torch.equal(stored(sources["lm_head.weight"]), held["lm_head.weight"].flatten())


def test_tensors_of_another_type_take_the_other_road(model_folder, tmp_path):
    def of_bytes(held):
        return {**held, "model.norm.weight": torch.zeros(32, dtype=torch.int8)}

    planned = plan(changed(model_folder("llama"), tmp_path, of_bytes))
    assert (planned.sources, planned.not_sliced) == (None, "model.norm.weight is stored as I8")
    loading.check_loadable(planned, "world")
    with pytest.raises(
        ModelError, match=r"shard_group = node: .* by slices, but of .* model\.norm\.weight is stored as I8"
    ):
        loading.check_loadable(planned, "node")


def test_what_the_model_does_not_have_is_named(model_folder, tmp_path):
    def with_more(held):
        return {**held, "model.layers.9.mlp.up_proj.weight": torch.zeros(2)}

    planned = plan(changed(model_folder("llama"), tmp_path, with_more))
    assert planned.sources is not None
    note = "1 tensors of the base's files are not the model's, e.g. model.layers.9.mlp.up_proj.weight: not read"
    assert planned.notes == (note,)


def test_old_checkpoints_rotary_buffers_are_passed_over(model_folder, tmp_path):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
    found = plan(changed(model_folder("llama"), tmp_path, lambda held: held | extra))
    assert found.sources.keys() == dict(models.llama().named_parameters()).keys()
    assert found.notes == ()


# Files that are missing, damaged or of another model ------------------------------------------------------------------


def test_missing_shard_is_named(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "copy")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name} missing. Give a folder with all of its"):
        plan(folder)


def test_folder_without_safetensors_is_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "copy", ignore=shutil.ignore_patterns("*safetensors*"))
    with pytest.raises(ModelError, match=r"model.safetensors missing. .*other formats are not read"):
        plan(folder)


def test_index_without_a_map_is_refused(model_folder, tmp_path):
    folder = changed(model_folder("llama"), tmp_path, lambda held: held)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ModelError, match=r"index\.json has no weight_map and metadata .*: 'weight_map'. Fetch it"):
        loading.plan(folder, ModelConfig(path=str(folder), dtype="fp32"), LoraConfig(r=4), 4)


@pytest.mark.parametrize("cut", [4, 100, -1], ids=["in its length", "in its header", "in its values"])
def test_file_that_is_cut_short_is_named(cut, model_folder, tmp_path):
    path = changed(model_folder("llama"), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"copy/model.safetensors: .*etch it again"):
        plan(path.parent)


def load_or_message(whole, folder, policy):
    settings = ModelConfig(path=folder, dtype="fp32")
    planned = loading.Plan(Path(folder), loading.plan(Path(whole), settings, LoraConfig(r=4), 4).skeleton, [], None)
    try:
        loading.load(settings, models.deepspeed_config(policy), planned, 1)
    except ModelError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(("world_size", "policy"), [(1, "stage0"), (2, "zero3")])
def test_tensor_without_values_is_refused_not_drawn_at_random(world_size, policy, model_folder, tmp_path):
    """By the plan; and while loading, if the file changed since."""

    def cut(held):
        del held["model.layers.1.mlp.up_proj.weight"]
        return held

    folder = changed(model_folder("llama"), tmp_path, cut)
    lacking = r"hold no values for 1 tensors, e.g. model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=lacking):
        plan(folder)
    for message in run_ranks(world_size, load_or_message, str(model_folder("llama")), str(folder), policy):
        assert lacking in message


def test_tensor_of_another_shape_is_refused(model_folder, tmp_path):
    folder = changed(model_folder("llama"), tmp_path, lambda held: {**held, "model.norm.weight": torch.zeros(31)})
    with pytest.raises(ModelError, match=r"1 tensors of another shape, e.g. model.norm.weight \(31,\), .* \(32,\)"):
        plan(folder)


# Pickles: only where asked for, and nothing but tensors ---------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_read_only_if_allowed(shards, model_folder, tmp_path):
    folder = pickled(model_folder("qwen2"), tmp_path, shards)
    with pytest.raises(ModelError, match=r"pytorch_model.bin only, a pickle, .* or set model.allow_pickle: true"):
        plan_of_pickle(folder, allowed=False)
    planned = plan_of_pickle(folder)
    assert planned.sources is None
    loading.check_loadable(planned, "world")
    with pytest.raises(ModelError, match=r"shard_group = node: needs"):
        loading.check_loadable(planned, "node")


def test_safetensors_are_taken_before_pickles(model_folder, tmp_path):
    folder = pickled(model_folder("llama"), tmp_path)
    for path in model_folder("llama").glob("*safetensors*"):
        shutil.copy(path, folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert plan_of_pickle(folder).sources is not None


@pytest.mark.parametrize("old_format", [False, True])
def test_malicious_pickle_is_not_run(old_format, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pickled(model_folder("llama"), tmp_path, more=Malicious())
    if old_format:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Malicious()}, protocol=2))
    with pytest.raises(ModelError, match=r"pytorch_model.bin: (refers to \S*(getattr|Path)|cannot be read).* Fetch it"):
        plan_of_pickle(folder)
    planned = loading.Plan(folder, plan(model_folder("llama")).skeleton, [], None)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):  # nor by from_pretrained, if it came that far
        loading._from_pretrained(ModelConfig(path=str(folder), allow_pickle=True), planned, whole=True)
    assert not Path("run_by_the_pickle").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"x" * 100, "cannot be read"),
        (pickle.dumps([1]), "cannot be read"),
        ([1, 2], "holds no mapping of names to tensors"),
        ({"model": {"x": torch.zeros(2)}}, "holds no mapping of names to tensors"),
        ({"model.norm.weight": torch.zeros(32)}, "hold no values for 38 tensors, e.g. lm_head.weight"),
    ],
)
def test_damaged_pickle_is_named(content, message, model_folder, tmp_path):
    folder = pickled(model_folder("llama"), tmp_path)
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        plan_of_pickle(folder)
