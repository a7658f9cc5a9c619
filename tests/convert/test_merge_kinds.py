"""Every kind of adapter that PEFT writes, merged: what the result computes is what PEFT's live model does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from lora_one_dist.convert import files, merge
from lora_one_dist.disk.lazy import ConversionError
from tests import models, tool

LARGER = 70  # rows of a vocabulary that was resized; models.VOCABULARY of the base
LOGITS = 1e-5  # of numbers up to 5: products in fp64, but each merged weight and RMSNorm rounded to fp32
Q = {"target_modules": ["q_proj"]}
PARAMETERS = ["q_proj.weight", "mlp.up_proj.weight"]
BOTH = ["embed_tokens", "lm_head"]
APART = {"embed_tokens": [5, 40], "lm_head": [9]}

# Name: base, settings, rows of the vocabulary, whether tied embeddings stay so (None where the base has two).
KINDS = {
    "resized, saved": ("llama", {**Q, "modules_to_save": BOTH}, LARGER, None),
    "resized, saved, tied": ("qwen2", {**Q, "modules_to_save": BOTH}, LARGER, False),
    "resized, one saved, tied": ("qwen2", {**Q, "modules_to_save": ["embed_tokens"]}, LARGER, False),
    "resized, not trained": ("llama", Q, LARGER, None),
    "resized, not trained, tied": ("qwen2", Q, LARGER, True),
    "resized, LoRA": ("llama", {"target_modules": [*BOTH, "q_proj"]}, LARGER, None),
    "resized, tokens": ("llama", {**Q, "trainable_token_indices": [66, 5]}, LARGER, None),
    "resized, tokens, tied": ("qwen2", {**Q, "trainable_token_indices": [66, 5]}, LARGER, True),
    "made smaller": ("llama", {**Q, "modules_to_save": BOTH}, 60, None),
    "tokens": ("llama", {**Q, "trainable_token_indices": [40, 5]}, None, None),
    "tokens of both": ("llama", {**Q, "trainable_token_indices": APART}, None, None),
    "tokens, tied": ("qwen2", {**Q, "trainable_token_indices": [40, 5]}, None, True),
    "tokens of both, tied": ("qwen2", {**Q, "trainable_token_indices": APART}, None, False),
    "LoRA on embeddings": ("llama", {"target_modules": [*BOTH, "q_proj"], "use_rslora": True}, None, None),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True}, None, None),
    "bias": ("qwen2", {**Q, "bias": "all"}, None, None),
    "bias of the layers": ("qwen2", {**Q, "bias": "lora_only", "lora_bias": True}, None, None),
    "parameters": ("llama", {"target_modules": [], "target_parameters": PARAMETERS}, None, None),
    "parameters and modules": (
        "llama",
        {
            "target_modules": ["v_proj"],
            "target_parameters": PARAMETERS,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj\.weight": 2, "up_proj": 7},  # the second names a module
        },
        None,
        None,
    ),
    "saved by the end of a name": ("llama", {**Q, "modules_to_save": ["norm", "mlp"]}, None, None),
    "PiSSA, converted": ("llama", {**Q, "init_lora_weights": "pissa"}, None, None),
    "OLoRA, converted": ("llama", {**Q, "init_lora_weights": "olora", "use_rslora": True}, None, None),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a base by kind."""
    return {kind: models.save(kind, tmp_path_factory.mktemp("bases") / kind) for kind in models.MODELS}


def trained(base: Path, out: Path, settings: dict, rows: int | None = None) -> PeftModel:
    """A live model whose adapter PEFT made and saved, with each of its tensors changed as by training."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(5)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    live = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    conversion = {}
    if settings.get("init_lora_weights") is not None:
        live.save_pretrained(out.with_name("before"))
        conversion = {"path_initial_model_for_weight_conversion": str(out.with_name("before"))}
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = copy.deepcopy(live)  # PEFT's conversion changes the live model
    live.save_pretrained(out, **conversion)
    return found.double().eval()


IDS = torch.arange(2, 58).view(2, 28)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied weights and resized embeddings
def test_computes_what_peft_does(kind, bases, tmp_path):
    name, settings, rows, tied = KINDS[kind]
    expected = logits(trained(bases[name], tmp_path / "adapter", settings, rows))
    merge.run(merge.plan(bases[name], tmp_path / "adapter"), tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values()), info
    distance = (logits(merged) - expected).abs().max().item()
    print(f"{kind}: {distance:.1e} of {expected.abs().max():.0f}")
    assert distance <= LOGITS
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == (rows or models.VOCABULARY)
    assert tied is None or config["tie_word_embeddings"] is tied
    before = logits(AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float64))
    both = min(config["vocab_size"], models.VOCABULARY)
    assert (before[..., :both] - expected[..., :both]).abs().max() > 1000 * LOGITS, "nothing was trained"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_vocab_size_changes_where_it_was(bases, tmp_path):
    base = bases["llama"]
    trained(base, tmp_path / "adapter", {**Q, "modules_to_save": BOTH}, LARGER)
    config = json.loads((base / "config.json").read_text())
    nested = tmp_path / "nested"
    nested.mkdir()
    files.copy_rest(base, nested)
    files.write_model(nested, files.model_shards(base))
    for top, inside in [({}, {"vocab_size": 64}), ({"vocab_size": 64}, {"vocab_size": 64}), ({"vocab_size": 64}, {})]:
        outer = {key: value for key, value in config.items() if key != "vocab_size"}
        (nested / "config.json").write_text(json.dumps({**outer, **top, "text_config": {"hidden_size": 32, **inside}}))
        planned = merge.plan(nested, tmp_path / "adapter")
        assert "the vocabulary goes from 64 to 70 rows, in config.json too" in planned.notes
        assert planned.config["text_config"] == {"hidden_size": 32, **dict.fromkeys(inside, LARGER)}
        assert {key: planned.config[key] for key in planned.config if key == "vocab_size"} == dict.fromkeys(top, LARGER)


def test_a_tied_tensor_that_is_stored_twice_changes_in_both(bases, tmp_path):
    trained(bases["qwen2"], tmp_path / "adapter", {**Q, "trainable_token_indices": [40, 5]})
    shards = files.model_shards(bases["qwen2"])
    name = "model.embed_tokens.weight"
    (file,) = (file for file, tensors in shards.items() if name in tensors)
    shards[file]["lm_head.weight"] = shards[file][name]
    (tmp_path / "base").mkdir()
    files.copy_rest(bases["qwen2"], tmp_path / "base")
    files.write_model(tmp_path / "base", shards)
    planned = merge.plan(tmp_path / "base", tmp_path / "adapter")
    merged = {name: tensor for tensors in planned.shards.values() for name, tensor in tensors.items()}
    assert torch.equal(merged["lm_head.weight"].read(), merged[name].read())
    assert not torch.equal(merged[name].read(), shards[file][name].read())
    assert planned.config["tie_word_embeddings"] is True


# The tokenizer ------------------------------------------------------------------------------------------------------

TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_takes_the_adapters_tokenizer_and_says_so(bases, tmp_path):
    trained(bases["qwen2"], tmp_path / "adapter", Q, LARGER)
    tokenizer = AutoTokenizer.from_pretrained(bases["qwen2"])
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    files.copy_rest(bases["qwen2"], tmp_path / "base")
    files.write_model(tmp_path / "base", files.model_shards(bases["qwen2"]))
    (tmp_path / "base" / "merges.txt").write_text("of the base")  # belongs to a tokenizer that is replaced
    (tmp_path / "base" / "LICENSE.txt").write_text("of the base")
    said = tool.run("merge_adapter", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged").stdout
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (len(merged), merged.chat_template) == (len(tokenizer), TEMPLATE)
    assert not (tmp_path / "merged" / "merges.txt").exists()
    assert (tmp_path / "merged" / "LICENSE.txt").read_text() == "of the base"
    assert "taken from the adapter, as the base's differ: chat_template.jinja, tokenizer.json, tokenizer_config" in said


def test_takes_the_adapters_chat_template_alone(bases, tmp_path):
    trained(bases["llama"], tmp_path / "adapter", Q)
    (tmp_path / "adapter" / "chat_template.jinja").write_text(TEMPLATE)
    planned = merge.plan(bases["llama"], tmp_path / "adapter")
    assert planned.notes[-1] == "taken from the adapter, as the base's differ: chat_template.jinja"
    merge.run(planned, tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (len(merged), merged.chat_template) == (models.VOCABULARY, TEMPLATE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tokenizer_with_tokens_that_no_row_is_for(bases, tmp_path):
    trained(bases["llama"], tmp_path / "adapter", Q, LARGER)
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.add_tokens([f"<new{i}>" for i in range(LARGER - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge.plan(bases["llama"], tmp_path / "adapter")
    drop(tmp_path / "adapter", "lm_head", "embed_tokens")  # as with save_embedding_layers=False
    message = r"tokens up to number 69, the merged .* 64 rows: .*Save it with save_embedding_layers=True, or take"
    with pytest.raises(ConversionError, match=message):
        merge.plan(bases["llama"], tmp_path / "adapter")


def test_an_equal_tokenizer_is_no_news(bases, tmp_path):
    trained(bases["llama"], tmp_path / "adapter", Q)
    for path in files.tokenizer_files(bases["llama"]).values():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    planned = merge.plan(bases["llama"], tmp_path / "adapter")
    assert not any("taken from" in note for note in planned.notes)
    assert all(path.parent == bases["llama"] for path in planned.beside.values())


# What cannot be merged ----------------------------------------------------------------------------------------------

LIVE = r"PeftModel\.from_pretrained\(base, adapter\)"
TO_PEFT = rf"Leave it to PEFT: {LIVE}\.merge_and_unload\(\)"
HOLDS_NOT = r"which changed the base: .* Save it with path_initial_model_for_weight_conversion"
AGAIN = rf"Or leave it to PEFT, which takes it out again: {LIVE}\.merge_and_unload\(\)"


def experts(out: Path, parameters: list[str]) -> None:
    """An adapter of a mixture of experts, whose weights are in one tensor of three dimensions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=4, num_key_value_heads=2, **sizes))
    get_peft_model(model, LoraConfig(r=3, target_modules=[], target_parameters=parameters)).save_pretrained(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True}, rf"has no .*0\.self_attn\.q_proj\.bias;.* by PEFT neither\. Serve it unmerged: {LIVE}"),
        ({"alora_invocation_tokens": [1]}, rf"alora_invocation_tokens is \[1\].* Leave it to PEFT: {LIVE}\.$"),
        ({"init_lora_weights": "pissa"}, rf"init_lora_weights is pissa, {HOLDS_NOT}.*\. {AGAIN}"),
        ({"init_lora_weights": "olora"}, rf"init_lora_weights is olora, {HOLDS_NOT}.*\. {AGAIN}"),
        ({"init_lora_weights": "pissa_niter_4"}, rf"init_lora_weights is pissa_niter_4, {HOLDS_NOT}.* its training\.$"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_merged_names_pefts_way(settings, message, bases, tmp_path):
    base = bases["llama"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **Q, **settings))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConversionError, match=message):
        merge.plan(base, tmp_path / "adapter")


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_starts_that_need_data_are_refused_by_their_name(start, bases, tmp_path):
    trained(bases["llama"], tmp_path / "adapter", Q)
    change_config(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(ConversionError, match=rf"init_lora_weights is {start}, .*{HOLDS_NOT}") as caught:
        merge.plan(bases["llama"], tmp_path / "adapter")
    assert "Or leave it" not in str(caught.value), "PEFT takes another out at each load"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["experts.down_proj"], r"lora_A is \(12, 8\), r is 3: target_parameters of more than 2 dimensions"),
        (["experts.down_proj", "experts.gate_up_proj"], "experts is adapted in several parameters: target_parameters"),
    ],
)
def test_experts_are_left_to_peft(parameters, message, bases, tmp_path):
    experts(tmp_path / "adapter", parameters)
    with pytest.raises(ConversionError, match=rf"{message}.*{TO_PEFT}"):
        merge.plan(bases["llama"], tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_vocabularies_that_do_not_fit(bases, tmp_path):
    """Saved by hand or by an older PEFT: one embedding resized, or tokens that the base does not have."""
    base = bases["llama"]
    trained(base, tmp_path / "one", {**Q, "modules_to_save": BOTH}, LARGER)
    drop(tmp_path / "one", "lm_head")
    with pytest.raises(
        ConversionError, match=r"has 64 rows in lm_head\.weight, and .*embed_tokens\.weight 70 and leaves"
    ):
        merge.plan(base, tmp_path / "one")
    trained(base, tmp_path / "tokens", {**Q, "trainable_token_indices": [66, 5]}, LARGER)
    drop(tmp_path / "tokens", "lm_head", "base_layer")
    message = (
        r"embed_tokens\.weight is \(64, 32\), the adapter's rows \(2, 32\) of tokens up to 66 \(resize the base first\)"
    )
    with pytest.raises(ConversionError, match=message):
        merge.plan(base, tmp_path / "tokens")
    change_config(tmp_path / "tokens", trainable_token_indices=[1, 2, 3])
    with pytest.raises(ConversionError, match=r"is \(2, 32\), trainable_token_indices names 3 tokens"):
        merge.plan(base, tmp_path / "tokens")


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(adapter: Path, *parts: str) -> None:
    """Take out the tensors with one of these in their names."""
    path = adapter / "adapter_model.safetensors"
    kept = {n: t.clone() for n, t in load_file(path).items() if not any(part in n for part in parts)}
    save_file(kept, path, metadata={"format": "pt"})
