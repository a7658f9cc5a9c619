"""Models of an encoder and a decoder: the gradient in both, whole runs, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
)
from transformers.models.t5 import modeling_t5

from lora_one_dist.base.graph import begin_at_embeddings
from lora_one_dist.base.rehearsal import rehearse
from lora_one_dist.base.skeleton import ModelError, build_skeleton
from lora_one_dist.base.two_stacks import refuse_settings
from lora_one_dist.commands import inspect_data, plan, verify
from lora_one_dist.config.reading import parse_config
from lora_one_dist.config.settings import DataConfig, ModelConfig
from lora_one_dist.convert import compare, merge, zero
from lora_one_dist.data import batches
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.samples import load_eval_prompts, tokenize
from lora_one_dist.initialise import gradient
from lora_one_dist.train import evaluate
from tests import models, reference
from tests.initialise.test_gradient import SAMPLES, TOLERANCE, load_base
from tests.ranks import run_ranks, write_json_lines
from tests.runs import metrics, refused, settings, train

SIZES = {"vocab_size": models.VOCABULARY, "d_model": 32, "decoder_start_token_id": 2, "pad_token_id": 0}
BART = {
    **SIZES,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_layerdrop": 0.0 for side in ("encoder", "decoder")},
    **{"max_position_embeddings": 64, "dropout": 0.0, "init_std": 0.2, "forced_eos_token_id": None},
}
OWN = {
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "led": {
        "attention_window": 8,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "eos_token_id": 2,
    },
    "fsmt": {f"{side}_vocab_size": models.VOCABULARY for side in ("src", "tgt")},
}


def pairs(count: int) -> list[dict]:
    """Samples of uneven prompts and completions, as the data give them."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        prompt, completion = (int(torch.randint(2, 9, (), generator=generator)) for _ in range(2))
        ids = torch.randint(3, models.VOCABULARY, (prompt + completion,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "encoder_length": prompt})
    return made


def token_losses(model, sample: dict) -> torch.Tensor:
    """Of one sample, unpadded, by the model's own way from labels to what the decoder reads."""
    prompt, labels = (torch.tensor(x) for x in (sample["input_ids"][: sample["encoder_length"]], sample["labels"]))
    labels = labels[sample["encoder_length"] :]
    given = {"labels": labels[None]}
    if model.config.model_type == "fsmt":  # of labels it makes a loss alone
        given = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels[None].clone())}
    logits = model(input_ids=prompt[None], **given, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def true_gradient(model, samples: list[dict]) -> tuple[dict[str, torch.Tensor], float]:
    """dL/dW of every linear layer with a part in it but the head, and L, by plain autograd in float64."""
    model = model if model.config.model_type == "fsmt" else model.double()  # its mask is for float32
    head = model.get_output_embeddings()
    named = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    loss = torch.cat([token_losses(model, sample) for sample in samples]).mean()
    found = zip(named, torch.autograd.grad(loss, [*named.values()], allow_unused=True), strict=True)
    return {name: G for name, G in found if G is not None}, float(loss.detach())


def owned_gradients(folder: Path, zero_json: str, checkpointing: str, groups: int, micro_batch_size: int):
    """Runs on a rank: what it owns, and the loss of each layer group."""
    from lora_one_dist.cluster import comm, ownership
    from lora_one_dist.initialise import gradient

    more = {"stage3_max_reuse_distance": 0} if zero_json == "zero3" else {}
    base, targets = load_base(folder, zero_json, checkpointing, **more)
    (batch,) = gradient.deal_micro_batches(pairs(SAMPLES), micro_batch_size, "token", 1, pad_token_id=0)
    costs = [float(t.m * t.n) for t in targets]
    owned, losses = {}, []
    for group in ownership.split(costs, groups):
        owners = ownership.assign([costs[i] for i in group], comm.world_size())
        found, loss = gradient.full_gradient(base, [targets[i] for i in group], owners, batch, "device")
        owned |= found
        losses.append(loss)
    return owned, losses


CASES = [  # ranks, ZeRO JSON, checkpointing, layer groups (of 5 the last two lie in the decoder alone), micro-batch
    (1, "stage0", "none", 5, 3),
    (2, "zero3", "non_reentrant", 5, 1),
    (3, "zero3", "reentrant", 1, 2),
    *(
        pytest.param((ranks, zero, kind, groups, 2), marks=pytest.mark.full)
        for ranks in (1, 2, 3)
        for zero in ("zero3", "stage0")
        for kind in ("non_reentrant", "reentrant")
        for groups in (1, 5)
    ),
]


def hold_gradient(model, folder: Path, ranks: int, *how) -> None:
    truth, true_loss = true_gradient(model, pairs(SAMPLES))
    results = run_ranks(ranks, owned_gradients, folder, *how)
    found = {name: G for owned, _ in results for name, G in owned.items()}
    assert sorted(found) == sorted(truth), "both stacks, and the attention from one to the other"
    worst = max((reference.relative(G, truth[name]), name) for name, G in found.items())
    assert worst[0] <= TOLERANCE, worst
    assert all(abs(loss - true_loss) <= 1e-6 for _, losses in results for loss in losses)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradient_equals_autograd(case, model_folder):
    hold_gradient(models.t5(), model_folder("t5"), *case)


# Of a head that is not tied; keys and values of two inputs (pegasus_x); a head with a bias behind it, absolute
# positions, layers that text does not run, queries that are written to, padding to whole windows (led).
KINDS = ["t5 gated", "pegasus_x", "led"]
MORE = ["bart", "mt5", "umt5", "longt5", "mbart", "pegasus", "blenderbot", "m2m_100", "plbart", "mvp", "marian", "fsmt"]
HOW = {"led": (2, "zero3", "non_reentrant", 3, 1), "fsmt": (2, "zero3", "none", 3, 2)}


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.full) for kind in MORE)])
def test_gradient_of_other_kinds_equals_autograd(kind, tmp_path):
    torch.manual_seed(5)
    if kind == "t5 gated":
        model = models.t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    else:
        sizes = models.t5().config.to_diff_dict() if "t5" in kind else {**BART, **OWN.get(kind, {})}
        sizes = {key: value for key, value in sizes.items() if key not in ("model_type", "architectures")}
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **sizes))
    if kind in ("bart", "led"):
        model.final_logits_bias.normal_()
    model._keys_to_ignore_on_save = None  # marian's and fsmt's positions, which are computed
    model.save_pretrained(tmp_path)
    how = HOW.get(kind, (1, "stage0", "non_reentrant", 3, 2))
    hold_gradient(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), tmp_path, *how)


def sentences(count: int, seed: int) -> list[dict]:
    """Two classes, told by all of a sentence's words but one; the answer is two words or one."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        label, length = (int(torch.randint(*bounds, (), generator=generator)) for bounds in ((0, 2), (4, 9)))
        ids = torch.randint(4, 32, (length,), generator=generator)
        ids[1:] = ids[1:] // 2 * 2 + label
        ids = ids[torch.randperm(length, generator=generator)]
        made.append({"sentence": " ".join(f"w{i}" for i in ids.tolist()), "label": ["w40 w41", "w50"][label]})
    return made


def classify(folder: Path, out: Path, **changes) -> dict:
    """A run that learns to classify sentences."""
    raw = settings(folder, out, **changes)
    data = out.parent / "sentences"
    data.mkdir(exist_ok=True)
    for name, count, seed in (("train", 200, 0), ("eval", 24, 1)):
        if not (data / f"{name}.jsonl").exists():
            write_json_lines(data / f"{name}.jsonl", sentences(count, seed))
        raw["data"][name] = str(data / f"{name}.jsonl")
    raw["data"] |= {"prompt": "w60 {sentence}", "completion": "{label}"}
    return raw


def eval_loss(folder: Path, adapter: Path | None) -> float:
    """By PEFT's own class for the task, one unpadded row of the evaluation data at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
        assert type(model).__name__ == "PeftModelForSeq2SeqLM"
    losses = []
    for row in sentences(24, 1):
        prompt, completion = (tokenizer(text).input_ids for text in (f"w60 {row['sentence']}", row["label"]))
        sample = {"input_ids": prompt + completion, "labels": prompt + completion, "encoder_length": len(prompt)}
        with torch.no_grad():
            losses.append(token_losses(model, sample))
    return float(torch.cat(losses).double().mean())


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]


LEARNS = {"train__max_steps": 30, "train__exact_match_samples": 24, "optim__lr": 2e-2, "lora__r": 8}


@pytest.mark.full
def test_a_run_classifies_and_peft_and_a_merge_give_its_loss(model_folder, tmp_path, capsys):
    out, folder = tmp_path / "run", model_folder("t5")
    run_ranks(2, train, classify(folder, out, **LEARNS))
    first, last = metrics(out)[0], metrics(out)[-1]
    assert first["exact_match"] < 0.1
    assert last["exact_match"] > 0.9
    assert first["matthews"] < 0.1 < 0.8 < last["matthews"]
    assert eval_loss(folder, out / "adapter") == pytest.approx(last["eval_loss"], abs=1e-5)
    merge.run(merge.plan(folder, out / "adapter"), tmp_path / "merged")
    assert eval_loss(tmp_path / "merged", None) == pytest.approx(last["eval_loss"], abs=1e-5)
    both = [str(out / "adapter"), str(out / "adapter_init"), "--base", str(folder), "--prompt", "w60 w5 w7"]
    assert verify.main(both) == verify.DIFFERENT
    assert "logits:" in capsys.readouterr().out
    inferred = zero.infer_config(compare.open_any(out / "adapter").tensors, 8)
    described = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert described["task_type"] == inferred["task_type"] == "SEQ_2_SEQ_LM"


def test_tools_show_the_samples_and_plan(model_folder, tmp_path, capsys):
    raw = classify(model_folder("t5"), tmp_path / "run")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw))
    assert inspect_data.main(["--config", str(config), "--samples", "1"]) == 0
    assert re.search(r"\nw60 [w\d ]+</s>\[\[ w\d\d.*</s>\]\]\n", capsys.readouterr().out)
    assert inspect_data.main(["--config", str(config), "data.packing=true"]) == 1
    assert plan.main(["--config", str(config), "--ranks_per_host", "2", "--backend", "gloo"]) == 0
    assert "54 target layers" in capsys.readouterr().out
    assert plan.main(["--config", str(config), "data.packing=true"]) != 0


def test_a_decoder_deeper_than_its_encoder_answers():
    model = models.t5(num_layers=1, num_decoder_layers=3).eval()
    ids = torch.tensor([[5, 6, 7]])
    written = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, **evaluate.how_to_write(model))
    expected = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(4):
        logits = model(input_ids=ids, decoder_input_ids=expected, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1)[None]], 1)
    assert torch.equal(written, expected)


REFUSED = {
    "data__packing": (
        True,
        "data.packing = true: T5ForConditionalGeneration has an encoder .* Set data.packing: false",
    ),
    "data__loss_on": ("all", "data.loss_on = all: .* Set data.loss_on: completion"),
    "data__format": ("text", "data.format = text: .* Set data.format: completion"),
}


def refusals(raws: list[dict]) -> list[str]:
    """Runs on a rank."""
    return [refused(raw) for raw in raws]


def test_what_does_not_fit_is_refused_before_a_weight_is_read(model_folder, tmp_path):
    raws = [settings(model_folder("t5"), tmp_path / "run", **{key: value}) for key, (value, _) in REFUSED.items()]
    model = BartForConditionalGeneration(BartConfig(**{**BART, "max_position_embeddings": 16}))
    model.save_pretrained(tmp_path / "bart")
    models.tokenizer("t5").save_pretrained(tmp_path / "bart")
    long = write_json_lines(tmp_path / "long.jsonl", [{"prompt": "w4 " * 19, "completion": "w5"}] * 20)
    raws.append(settings(tmp_path / "bart", tmp_path / "run", data__train=str(long)))
    rules = [rule for _, rule in REFUSED.values()]
    rules.append(
        "longest training prompt has 20 tokens; BartEncoder has a table of 16 positions. Set data.max_length to 16"
    )
    (said,) = run_ranks(1, refusals, raws)
    for rule, message in zip(rules, said, strict=True):
        assert re.search(rule, message)


def test_a_decoder_without_a_first_token_is_refused(tmp_path):
    models.t5().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder_start_token_id": None}))
    found = build_skeleton(ModelConfig(path="base", dtype="fp32"), tmp_path)
    with pytest.raises(ModelError, match=r"does not say what its decoder begins with .* Set decoder_start_token_id"):
        rehearse(found, ModelConfig(path="base", dtype="fp32"))


@pytest.mark.parametrize(
    ("own", "rule"),
    [
        ({"encoder_layerdrop": 0.1}, r"encoder_layerdrop = 0\.1: layers would be left out at random.*Set it to 0"),
        ({"attention_type": "block_sparse"}, "block_sparse, which a short batch turns off .* original_full"),
    ],
)
def test_models_whose_layers_change_with_the_batch_are_refused(own, rule, tmp_path):
    model = BartForConditionalGeneration(BartConfig(**{**BART, **own}))
    model.config.save_pretrained(tmp_path)
    raw = settings(tmp_path, tmp_path / "run")
    with pytest.raises(ModelError, match=rule):
        refuse_settings(model, parse_config(raw))


def test_chats_and_variable_lengths_are_refused(model_folder, tmp_path):
    for change in ({"data__format": "chat"}, {"model__attn_implementation": "varlen", "model__dtype": "bf16"}):
        raw = settings(model_folder("t5"), tmp_path / "run", **change)
        with pytest.raises(ModelError, match="has an encoder that reads prompts"):
            refuse_settings(models.t5(), parse_config(raw))


def test_an_encoder_that_sees_its_padding_is_refused(tmp_path, monkeypatch):
    models.t5().config.save_pretrained(tmp_path)
    found = build_skeleton(ModelConfig(path="base", dtype="fp32"), tmp_path)
    assert rehearse(found, ModelConfig(path="base", dtype="fp32")) is None
    forward = type(found.encoder).forward
    monkeypatch.setattr(
        type(found.encoder), "forward", lambda self, *a, attention_mask=None, **k: forward(self, *a, **k)
    )
    with pytest.raises(ModelError, match=r"model_type = 't5' sees the padding of a prompt"):
        rehearse(found, ModelConfig(path="base", dtype="fp32"))


def test_a_decoder_that_sees_later_tokens_is_refused(tmp_path, monkeypatch):
    models.t5().config.save_pretrained(tmp_path)
    found = build_skeleton(ModelConfig(path="base", dtype="fp32"), tmp_path)

    def no_mask(inputs_embeds, **_settings):
        return inputs_embeds.new_zeros(1, 1, *[inputs_embeds.shape[1]] * 2)

    monkeypatch.setattr(modeling_t5, "create_causal_mask", no_mask)
    with pytest.raises(ModelError, match=r"model_type = 't5' sees the tokens that it is to predict"):
        rehearse(found, ModelConfig(path="base", dtype="fp32"))


def test_a_prompt_and_its_completion_become_a_sample(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder("t5"))
    rows = write_json_lines(
        tmp_path / "rows.jsonl",
        [{"prompt": "w3 w4", "completion": "w5"}, {"prompt": "w3 w4 w5 w6 w7", "completion": "w8"}],
    )
    config = DataConfig(train=str(rows), max_length=6)
    loaded = load_rows(str(rows), "train", None)
    found = tokenize(loaded, tokenizer, config, with_encoder=True)
    assert (len(found), found.num_truncated, found.num_without_targets) == (1, 1, 1), "a prompt too long for any answer"
    assert (found.dataset[0]["input_ids"], found.num_targets) == ([3, 4, 2, 5, 2], 2)
    batch = batches.collate([found.dataset[0], {**found.dataset[0], "encoder_length": 1}], 0)
    assert batch["input_ids"].tolist() == [[3, 4, 2], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 2, -100, -100], [-100, -100, 5, 2]]
    alone = tokenize(loaded, tokenizer, config)
    assert alone.dataset[0]["input_ids"] != found.dataset[0]["input_ids"], "another file of the cache"
    assert load_eval_prompts(loaded, tokenizer, config, [0], with_encoder=True) == [([3, 4, 2], "w5")]


@pytest.mark.parametrize(
    ("around", "prompt", "completion"),
    [("$A", [2], [5, 2]), ("$A </s>", [2], [5, 2]), ("$A </s> w60", [2, 60], [5, 2, 60])],  # the last as MBart's
)
def test_what_a_tokenizer_puts_around_a_text_is_kept(around, prompt, completion, tmp_path):
    tokenizer = models.tokenizer("t5")
    special = [("</s>", 2), ("w60", 60)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=special)
    rows = write_json_lines(tmp_path / "rows.jsonl", [{"prompt": "", "completion": "w5"}])
    loaded, config = load_rows(str(rows), "train", None), DataConfig(train=str(rows), max_length=9)
    (sample,) = tokenize(loaded, tokenizer, config, with_encoder=True).dataset
    assert (sample["input_ids"], sample["encoder_length"]) == ([*prompt, *completion], len(prompt))
    assert load_eval_prompts(loaded, tokenizer, config, [0], with_encoder=True) == [(prompt, "w5")]


def test_types_are_as_transformers_keeps_them(model_folder, monkeypatch):
    """`wo`, which some releases keep in fp32 and others in bf16."""
    folder = model_folder("t5")
    for kept in (None, {"wo"}):
        monkeypatch.setattr(modeling_t5.T5PreTrainedModel, "_keep_in_fp32_modules_strict", kept)
        found = build_skeleton(ModelConfig(path=str(folder), dtype="bf16"), folder)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {n: p.dtype for n, p in found.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_blocks_below_the_targets_keep_nothing():
    """Of the decoder's layers alone the encoder is not in the graph, which begins at its end."""
    model = models.t5()
    begin_at_embeddings(freeze(model))
    blocks = [*model.encoder.block, *model.decoder.block]
    for below in (2, 4, 5):
        layers = {layer for layer in blocks[below].modules() if isinstance(layer, nn.Linear)}
        layers |= {layer for layer in blocks[6].modules() if isinstance(layer, nn.Linear)}
        assert gradient._below(model, layers) == blocks[:below]
        with gradient._backward_down_to(model, layers):
            found = graphs_of(model, blocks)
        begun = {below - 1, *([3] if below > 4 else [])}
        assert found == [i >= below or i in begun for i in range(7)]
    assert graphs_of(model, blocks) == [True] * 7, "no hook is left"
    assert gradient._below(model, {model.lm_head}) == []


def freeze(model):
    model.requires_grad_(False)
    return model


def graphs_of(model, blocks) -> list[bool]:
    """Of each block's output: is it in a graph?"""
    found: dict[nn.Module, bool] = {}
    handles = [
        block.register_forward_hook(lambda block, _, output: found.__setitem__(block, output[0].requires_grad))
        for block in blocks
    ]
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[7]]))
    for handle in handles:
        handle.remove()
    return [found[block] for block in blocks]


@pytest.mark.full
def test_losses_do_not_depend_on_the_ranks_and_a_run_goes_on_on_fewer(model_folder, tmp_path):
    """Of answers long enough for gradients of full rank: the rest of a top space is noise, another on each rank."""
    folder, made = model_folder("t5"), {}
    for ranks, policy in ((1, "stage0"), (2, "zero3")):
        made[ranks] = settings(folder, tmp_path / str(ranks), train__max_steps=20, init__layer_groups=3)
        made[ranks] |= {"checkpoint": {"steps": 10}, "deepspeed": {"config": f"ds_configs/{policy}.json"}}
        run_ranks(ranks, train, made[ranks])
    losses = losses_of(tmp_path / "1")
    assert losses_of(tmp_path / "2") == pytest.approx(losses, abs=1e-5, rel=0)
    branch = {"output_dir": str(tmp_path / "3"), "resume": str(tmp_path / "2/checkpoints/step-10")}
    run_ranks(1, train, {**made[2], **branch})
    assert losses_of(tmp_path / "3") == pytest.approx(losses[10:], abs=1e-5, rel=0)
    assert len(losses) == 20
