"""The base model: which layers are targets, where its values lie, what is refused before they are read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    OPTForCausalLM,
)

from lora_one_dist import comm, data, model, sharding, weights
from lora_one_dist.config import LoraConfig, ModelConfig
from lora_one_dist.model import ModelError, Target, dropout_off, find_targets
from tests import models, reference
from tests.ranks import run_ranks

LLAMA_LAYER = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (72, 32),
    "mlp.up_proj": (72, 32),
    "mlp.down_proj": (32, 72),
}


@pytest.fixture(scope="module")
def llama():
    return models.llama(layers=2)


def gpt2(**changes):
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **changes))


# Targets --------------------------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head_in_order(llama):
    expected = [Target(f"model.layers.{i}.{name}", m, n) for i in (0, 1) for name, (m, n) in LLAMA_LAYER.items()]
    assert find_targets(llama, LoraConfig(r=16)) == expected


def test_all_linear_leaves_a_tied_head_out():
    names = [target.name for target in find_targets(models.qwen2(), LoraConfig(r=4))]
    assert len(names) == 5 * 7
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("endings", "names"),
    [
        (
            ["v_proj", "q_proj"],
            ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"],
        ),
        (["1.self_attn.v_proj"], ["1.self_attn.v_proj"]),
        (["mlp.up_proj", "0.mlp.up_proj"], ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (["model.layers.0.mlp.down_proj"], ["0.mlp.down_proj"]),
    ],
)
def test_list_matches_whole_dotted_endings_in_model_order(endings, names, llama):
    found = find_targets(llama, LoraConfig(r=4, target_modules=endings))
    assert [target.name for target in found] == [f"model.layers.{name}" for name in names]


def test_untied_head_can_be_named(llama):
    assert find_targets(llama, LoraConfig(target_modules=["lm_head"])) == [Target("lm_head", 64, 32)]


@pytest.mark.parametrize(
    ("lora", "rank_needed", "message"),
    [
        ({"target_modules": ["q_porj"]}, 0, "'q_porj' matches no layer. Did you mean q_proj"),
        ({"target_modules": ["proj"]}, 0, "'proj' matches no layer. Did you mean"),
        ({"target_modules": ["f_attn.q_proj"]}, 0, "'f_attn.q_proj' matches no layer"),
        (
            {"target_modules": ["zz"]},
            0,
            "'zz' matches no layer. Linear layers here: down_proj, gate_proj, k_proj, lm_head",
        ),
        ({"target_modules": ["q_proj", "aa", "bb"]}, 0, "'aa' matches no layer. .*'bb' matches no layer. "),
        ({"target_modules": [""]}, 0, "'' matches no layer"),
        ({"target_modules": []}, 0, r"target_modules = \[\]: no layer left to adapt. Name at least one"),
        ({"target_modules": ["mlp"]}, 0, "model.layers.0.mlp is a LlamaMLP; only nn.Linear is supported"),
        ({"target_modules": ["embed_tokens"]}, 0, "model.embed_tokens is a Embedding; only nn.Linear is supported"),
        ({"r": 17}, 0, r"lora.r = 17: must be at most min\(m, n\) = 16 of model.layers.0.self_attn.k_proj. Lower it"),
        ({"r": 33, "target_modules": ["q_proj"]}, 0, r"at most min\(m, n\) = 32 of model.layers.0.self_attn.q_proj"),
        ({"r": 10}, 20, "lora.r = 10: this init.method takes 20 singular vectors, .*k_proj has 16. Lower lora.r"),
    ],
)
def test_target_list_that_cannot_work_is_refused(lora, rank_needed, message, llama):
    with pytest.raises(ModelError, match=message):
        find_targets(llama, LoraConfig(**lora), rank_needed)


def test_rank_up_to_the_narrowest_target_is_accepted(llama):
    assert len(find_targets(llama, LoraConfig(r=16), 16)) == 14
    assert len(find_targets(llama, LoraConfig(r=32, target_modules=["q_proj"]), 32)) == 2


@pytest.mark.parametrize("endings", [["lm_head"], ["q_proj", "embed_tokens"]])
def test_target_that_shares_its_weight_is_refused(endings):
    with pytest.raises(ModelError, match=r"lm_head shares its weight with model.embed_tokens; its gradient would be"):
        find_targets(models.qwen2(), LoraConfig(r=4, target_modules=endings))


def test_transposed_layers_are_refused():
    with pytest.raises(ModelError, match=r"all-linear: the model has Conv1D layers \(transposed weights\)"):
        find_targets(gpt2(), LoraConfig(r=4))
    with pytest.raises(ModelError, match=r"h.0.attn.c_attn is a Conv1D; only nn.Linear is supported"):
        find_targets(gpt2(), LoraConfig(r=4, target_modules=["c_attn"]))


@pytest.mark.parametrize("endings", ["all-linear", ["q_proj"]])
def test_mixture_of_experts_is_refused(endings):
    with init_empty_weights(include_buffers=False):
        mixtral = AutoModelForCausalLM.from_config(MixtralConfig(num_hidden_layers=1, num_local_experts=4))
    with pytest.raises(ModelError, match=r"experts.* \(4, .*the gradient phase does not support. Use a dense model"):
        find_targets(mixtral, LoraConfig(r=4, target_modules=endings))


def test_mixture_of_experts_as_a_module_list_is_refused(llama):
    dense = models.llama(layers=1)
    dense.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.experts is a mixture of experts"):
        find_targets(dense, LoraConfig(r=4))


# The plan: config.json and the tensors' names and places --------------------------------------------------------------


def plan(folder: Path, **lora):
    return model.plan(folder, ModelConfig(path=str(folder), dtype="fp32"), LoraConfig(**{"r": 4, **lora}), 0)


def changed(folder: Path, tmp_path: Path, tensors=None, **config) -> Path:
    """A copy in one file: its tensors by a function of them, config.json with other values."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, copy)
    held = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    save_file(tensors(held) if tensors else held, copy / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**described, **config}))
    return copy


def stored(source: weights.TensorSource) -> torch.Tensor:
    raw = bytearray(source.path.read_bytes()[source.offset :])
    count = int(torch.tensor(source.shape).prod())
    return torch.frombuffer(raw, dtype=source.dtype, count=count).view(source.shape)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plan_finds_every_value_without_reading_one(kind, model_folder):
    found = plan(model_folder(kind))
    assert all(parameter.is_meta for parameter in found.skeleton.parameters())
    truth = dict(models.MODELS[kind]().named_parameters())  # a tied weight once
    assert found.sources.keys() == truth.keys()
    assert len({source.path for source in found.sources.values()}) > 2, "in several shards"
    for name, source in found.sources.items():
        assert torch.equal(stored(source), truth[name]), name


def test_skeleton_has_the_runs_dtype_and_attention(model_folder):
    settings = ModelConfig(path="x", dtype="bf16", attn_implementation="eager")
    skeleton = model.plan(model_folder("llama"), settings, LoraConfig(r=4), 0).skeleton
    assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}
    assert skeleton.config._attn_implementation == "eager"


def test_quantised_model_is_refused(model_folder, tmp_path):
    quantised = changed(model_folder("llama"), tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantised; .* Give the unquantised model"):
        plan(quantised)


def test_tied_weight_may_be_stored_under_its_other_name_or_both(model_folder, tmp_path):
    folder = model_folder("qwen2")
    head = changed(folder, tmp_path, lambda held: {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()})
    assert sum(name in ("lm_head.weight", "model.embed_tokens.weight") for name in plan(head).sources) == 1
    held = {name: tensor.clone() for name, tensor in load_file(head / "model.safetensors").items()}
    del held["model.embed_tokens.weight"]
    save_file(held, head / "model.safetensors", metadata={"format": "pt"})
    sources = plan(head).sources
    assert "lm_head.weight" in sources
    assert torch.equal(stored(sources["lm_head.weight"]), held["lm_head.weight"])


def rename(held):
    return {name.removeprefix("model."): tensor for name, tensor in held.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        rename,
        lambda held: {**held, "model.layers.9.mlp.up_proj.weight": torch.zeros(2)},
        lambda held: {**held, "model.norm.weight": torch.zeros(32, dtype=torch.int8)},
    ],
    ids=["renamed", "one too many", "another type"],
)
def test_tensors_that_do_not_map_one_to_one_take_the_other_road(tensors, model_folder, tmp_path):
    assert plan(changed(model_folder("llama"), tmp_path, tensors)).sources is None


def test_old_checkpoints_rotary_buffers_are_passed_over(model_folder, tmp_path):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
    found = plan(changed(model_folder("llama"), tmp_path, lambda held: held | extra))
    assert found.sources.keys() == dict(models.llama().named_parameters()).keys()


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


# Pickles: only where asked for, and nothing but tensors ---------------------------------------------------------------


class Malicious:
    """What a pickle may hold: a call of anything."""

    def __reduce__(self):
        return Path.touch, (Path("run_by_the_pickle"),)


def pickled(folder: Path, tmp_path: Path, shards: int = 1, **more) -> Path:
    """A copy of a model with its weights in pytorch_model*.bin."""
    copy = shutil.copytree(folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*safetensors*"))
    held = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()} | more
    if shards == 1:
        torch.save(held, copy / "pytorch_model.bin")
        return copy
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(held)}
    for shard in set(weight_map.values()):
        torch.save({name: held[name] for name in held if weight_map[name] == shard}, copy / shard)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return copy


def plan_of_pickle(folder: Path, allowed: bool = True) -> model.Plan:
    settings = ModelConfig(path=str(folder), dtype="fp32", allow_pickle=allowed)
    return model.plan(folder, settings, LoraConfig(r=4), 0)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_read_only_if_allowed(shards, model_folder, tmp_path):
    folder = pickled(model_folder("qwen2"), tmp_path, shards)
    with pytest.raises(ModelError, match=r"pytorch_model.bin only, a pickle, .* or set model.allow_pickle: true"):
        plan_of_pickle(folder, allowed=False)
    planned = plan_of_pickle(folder)
    assert planned.sources is None
    model.check_loadable(planned, "world")
    with pytest.raises(ModelError, match=r"shard_group = node: needs"):
        model.check_loadable(planned, "node")


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
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):  # nor by from_pretrained, if it came that far
        model._from_pretrained(ModelConfig(path=str(folder), allow_pickle=True), folder, whole=True)
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


@pytest.mark.parametrize("cut", [4, 100, -1], ids=["in its length", "in its header", "in its values"])
def test_file_that_is_cut_short_is_named(cut, model_folder, tmp_path):
    path = changed(model_folder("llama"), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"copy/model.safetensors: .*etch it again"):
        plan(path.parent)


def test_tokenizer_must_not_know_more_than_the_model(llama):
    tokenizer = models.tokenizer("llama")
    model.check_tokenizer(llama, tokenizer)  # its largest id is the model's last
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="the tokenizer's largest id is 64, the model has 64 embeddings"):
        model.check_tokenizer(llama, tokenizer)


# Loading --------------------------------------------------------------------------------------------------------------


def logits_by_both_roads(folders, stage):
    """Runs on a rank: the logits of the sliced road, then of ``from_pretrained``, which may read pickles."""
    load_pretrained, partitioned_while_read = sharding.load_pretrained, []

    def watched(build, ds_config):
        def watched_build():
            net = build()
            partitioned_while_read.append(all(hasattr(parameter, "ds_tensor") for parameter in net.parameters()))
            return net

        return load_pretrained(watched_build, ds_config)

    sharding.load_pretrained = watched
    deepspeed = models.deepspeed_config("zero3" if stage else "stage0", stage3_param_persistence_threshold=600)
    found = []
    for folder, sliced in zip(folders, (True, False), strict=True):
        settings = ModelConfig(path=folder, dtype="fp32", gradient_checkpointing="none", allow_pickle=True)
        planned = model.plan(Path(folder), settings, LoraConfig(r=4), 4)
        assert (planned.sources is not None) == sliced
        base = model.load(settings, deepspeed, planned, 1)
        assert not any(parameter.requires_grad for parameter in base.module.parameters())
        assert base.partitioned == (stage == 3)
        base.module.eval()
        with torch.no_grad():
            found.append(base.module(input_ids=ids().to(comm.device())).logits.cpu())
        names = [target.name for target in planned.targets]
        assert all(hasattr(base.module.get_submodule(name).weight, "ds_tensor") == (stage == 3) for name in names)
    assert partitioned_while_read == [stage == 3], "once, and no rank holds the whole base"
    return found


def ids() -> torch.Tensor:
    return torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize(("world_size", "stage", "pickles"), [(1, 0, False), (2, 3, False), (1, 0, True), (2, 3, True)])
def test_names_that_do_not_map_load_to_the_same_logits(world_size, stage, pickles, model_folder, tmp_path):
    # A checkpoint of the trunk alone: no "model." in its names, and the tied head in none.
    trunk = changed(model_folder("qwen2"), tmp_path, rename, architectures=["Qwen2Model"])
    folders = [str(model_folder("qwen2")), str(pickled(trunk, tmp_path, shards=2) if pickles else trunk)]
    truth = models.qwen2().eval()(input_ids=ids()).logits.detach()
    for sliced, pretrained in run_ranks(world_size, logits_by_both_roads, folders, stage):
        assert torch.equal(sliced, pretrained)
        # fp32 sums of 40 terms in the same kernels: equal but for their blocking.
        assert (sliced - truth).abs().max() <= 1e-5 * truth.abs().max()


def sharded(folder, shard_group):
    """Runs on a rank: elements held of each parameter (its own and all), the logits, and the copies there are."""
    settings = ModelConfig(path=folder, dtype="fp32", gradient_checkpointing="none")
    planned = model.plan(Path(folder), settings, LoraConfig(r=4), 4)
    deepspeed = models.deepspeed_config("zero3", shard_group, stage3_param_persistence_threshold=600)
    base = model.load(settings, deepspeed, planned, 1)
    parameters = list(base.module.parameters())
    if base.partitioned:
        held = [(parameter.ds_tensor.numel(), parameter.ds_numel) for parameter in parameters]
    else:  # every host has one rank: there is nobody to share with
        held = [(parameter.numel(), parameter.numel()) for parameter in parameters]
    with torch.no_grad():
        return held, base.module.eval()(input_ids=ids()).logits, base.copies


@pytest.mark.parametrize(
    ("hosts", "shard_group", "shares", "copies"),
    [
        ("aabb", "world", [4, 4, 4, 4], 1),
        ("aabb", "node", [2, 2, 2, 2], 2),
        ("abcd", "node", [1, 1, 1, 1], 4),
        ("aaab", "node", [3, 3, 3, 1], 2),
    ],
)
def test_each_rank_holds_its_share_of_its_groups_copy(hosts, shard_group, shares, copies, model_folder):
    truth = models.llama().eval()(input_ids=ids()).logits.detach()
    results = run_ranks(4, sharded, str(model_folder("llama")), shard_group, hosts=hosts)
    for (held, logits, found), share in zip(results, shares, strict=True):
        assert len(held) == 4 * 9 + 3, "every parameter"
        assert all(own == -(-whole // share) for own, whole in held), "rounded up: DeepSpeed pads the last share"
        assert found == copies
        assert torch.equal(logits, results[0][1])
        # fp32 sums of at most 72 terms in the same kernels: equal but for their blocking.
        assert (logits - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_base_whose_names_do_not_map_is_not_sharded_inside_hosts(model_folder, tmp_path):
    one_to_one, renamed = (
        plan(folder) for folder in (model_folder("llama"), changed(model_folder("llama"), tmp_path, rename))
    )
    model.check_loadable(one_to_one, "node")
    model.check_loadable(renamed, "world")
    with pytest.raises(ModelError, match=r"shard_group = node: needs .* one by one, but .* Use shard_group: world, or"):
        model.check_loadable(renamed, "node")


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
def test_loss_and_its_gradient_equal_autograds(dtype, rows_at_once, monkeypatch):
    monkeypatch.setattr(model, "LOSS_BYTES", 4 * 50 * rows_at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 50, generator=generator)).to(dtype)
    labels = torch.tensor([3, -100, 0, 49, -100, 7, 7])
    truth = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(truth, labels, reduction="sum") / 77
    exact.backward()
    leaf = logits.clone().requires_grad_()
    loss = model._CrossEntropySum.apply(leaf.clone(), labels, 1 / 77)  # as the model's own: not a leaf
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    # Rounded once to the logits' type (bf16: 8 bits, so to 2^-8 of itself); fp32 products before that.
    limit = (2**-8 if dtype == torch.bfloat16 else 0) * truth.grad.abs() + 1e-6 / 77
    assert ((gradient - truth.grad).abs() <= limit).all()
    assert gradient.dtype == dtype
    assert not gradient[1].any(), "no target, no gradient"


def test_loss_of_no_target_is_zero_and_evaluation_leaves_the_logits():
    logits = torch.randn(3, 5)
    kept, labels = logits.clone(), torch.full((3,), -100)
    leaf = logits.clone().requires_grad_()
    loss = model._CrossEntropySum.apply(leaf.clone(), labels, 1.0)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()
    with torch.no_grad():
        model._CrossEntropySum.apply(logits, torch.tensor([0, 1, 4]), 1.0)
    assert torch.equal(logits, kept)


# Forward passes -------------------------------------------------------------------------------------------------------


def opt():
    torch.manual_seed(4)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5))


def llama_with_dropout():
    torch.manual_seed(5)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_dropout=0.5, initializer_range=0.2))


def floats(net):
    """Every float attribute of every module: the probabilities among them."""
    return [value for module in net.modules() for value in vars(module).values() if isinstance(value, float)]


@pytest.mark.parametrize(
    "build",
    [lambda: gpt2(resid_pdrop=0.5, attn_pdrop=0.4, embd_pdrop=0.3), opt, llama_with_dropout],
    ids=["gpt2: modules", "opt: a function with the layer's attribute", "llama: in the attention kernel"],
)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_for_the_block_and_back_after_it(build, training):
    net = build()
    with torch.no_grad():
        expected = net.eval()(input_ids=ids()).logits
        net.train(training)
        before = floats(net)
        with dropout_off(net):
            assert net.training, "gradient checkpointing needs train mode"
            assert torch.allclose(net(input_ids=ids()).logits, expected, atol=1e-5)
        assert net.training == training
        with pytest.raises(KeyError), dropout_off(net):
            raise KeyError
        assert net.training == training
        assert floats(net) == before
        assert not torch.allclose(net.train()(input_ids=ids()).logits, expected, atol=1e-2), "it drops again"


def test_loss_sum_equals_a_loop_over_unpadded_samples(llama):
    net, samples = models.llama(layers=2).to(comm.device()), models.samples(5)
    assert len({len(sample["input_ids"]) for sample in samples}) > 1, "some are padded"
    with torch.no_grad():
        expected = sum(float(reference.token_losses(llama, sample).sum()) for sample in samples)
    found = model.loss_sum(net, data.collate(samples, 0))
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-5)  # fp32 sums of 60 terms


def test_loss_of_bf16_logits_is_summed_in_fp32():
    net, batch = models.llama(layers=1).to(comm.device(), torch.bfloat16), data.collate(models.samples(30), 0)
    with torch.no_grad():
        found = model.loss_sum(net, batch)
        logits = net(**{key: batch[key].to(comm.device()) for key in ("input_ids", "attention_mask")}).logits.double()
    targets = batch["labels"][:, 1:].to(comm.device())
    terms = -logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    # A sum above 1024 kept in bf16 would be off by up to 4.
    assert found.item() == pytest.approx(float(terms[targets != -100].sum()), rel=1e-5)


def test_weightless_batch_has_loss_and_gradient_zero():
    net = models.llama(layers=1).to(comm.device())
    loss = model.loss_sum(net, data.collate(models.samples(3), 0, weightless=True))
    assert loss.item() == 0.0
    loss.backward()
    assert float(net.model.layers[0].mlp.up_proj.weight.grad.abs().max()) == 0.0, "not NaN"


# Adapters -------------------------------------------------------------------------------------------------------------


def test_peft_config_names_the_endings_of_all_linear(llama):
    lora = LoraConfig(r=4, alpha=10, dropout=0.25, use_rslora=False)
    found = model.peft_config(lora, find_targets(llama, lora), "org/base")
    endings = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(found.target_modules) == endings, "not lm_head"
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 10, 0.25, False)
    assert (found.base_model_name_or_path, found.task_type, found.bias) == ("org/base", "CAUSAL_LM", "none")


def test_peft_config_keeps_a_given_list_and_takes_changes(llama):
    lora = LoraConfig(r=4, target_modules=["0.self_attn.q_proj", "v_proj"])
    found = model.peft_config(lora, find_targets(llama, lora), "x", r=8, lora_alpha=3.5)
    assert set(found.target_modules) == {"0.self_attn.q_proj", "v_proj"}
    assert (found.r, found.lora_alpha, found.use_rslora) == (8, 3.5, True)


def test_adapters_come_in_target_order_around_the_frozen_weights():
    net = models.llama(layers=2).requires_grad_(False).to(comm.device())
    lora = LoraConfig(r=4, target_modules=["1.self_attn.v_proj", "0.mlp.down_proj"])
    targets = find_targets(net, lora)
    weights = {target.name: net.get_submodule(target.name).weight for target in targets}
    adapters = model.inject_adapters(
        sharding.Base(net, copies=1), model.peft_config(lora, targets, "x"), targets, "bf16"
    )
    assert [adapter.target for adapter in adapters] == targets
    for adapter in adapters:
        assert adapter.weight is weights[adapter.target.name]
        assert (tuple(adapter.A.shape), tuple(adapter.B.shape)) == ((4, adapter.target.n), (adapter.target.m, 4))
        assert {adapter.A.dtype, adapter.B.dtype} == {torch.bfloat16}
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for adapter in adapters for parameter in (adapter.A, adapter.B)}


def test_layers_that_peft_takes_beyond_the_targets_are_refused():
    net = models.llama(layers=2)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    targets = find_targets(net, lora)
    with pytest.raises(ModelError, match=r"differ in \['model.layers.1.self_attn.q_proj'\]. Name the layers by longer"):
        model.inject_adapters(sharding.Base(net, copies=1), model.peft_config(lora, targets, "x"), targets[:1], "fp32")


def load_or_message(whole, folder, policy):
    settings = ModelConfig(path=folder, dtype="fp32")
    planned = model.Plan(Path(folder), model.plan(Path(whole), settings, LoraConfig(r=4), 4).skeleton, [], None)
    try:
        model.load(settings, models.deepspeed_config(policy), planned, 1)
    except model.ModelError as error:
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


def test_index_without_a_map_is_refused(model_folder, tmp_path):
    folder = changed(model_folder("llama"), tmp_path, lambda held: held)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ModelError, match=r"index\.json has no weight_map and metadata .*: 'weight_map'. Fetch it"):
        model.plan(folder, ModelConfig(path=str(folder), dtype="fp32"), LoraConfig(r=4), 4)


def test_dropout_that_the_forward_reads_from_the_config_is_off_too():
    base = models.llama(1)
    base.config.hidden_dropout = 0.5
    with dropout_off(base):
        assert base.config.hidden_dropout == 0.0
    assert base.config.hidden_dropout == 0.5
