"""Runs that train rows of new tokens, or whole tables: at 1 to 3 ranks, killed and resumed, by PEFT, merged."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Gemma3Config

from lora_one_dist.commands import merge_adapter, plan
from lora_one_dist.config.reading import parse_config
from lora_one_dist.data import batches
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.split import training_data
from lora_one_dist.plan.prediction import predict
from lora_one_dist.plan.shape import Cluster
from lora_one_dist.run import room
from tests import models, reference
from tests.base.test_head import build
from tests.kill_harness import Point, job
from tests.ranks import run_commands, run_ranks, write_json_lines
from tests.run.test_resume import losses_of
from tests.run.test_wrapped import WHOLE as WRAPPED
from tests.runs import metrics, refused, settings, train
from tools.bench import harness, phases

NEW = ["<think>", "</think>", "<x>"]
BOTH = ["embed_tokens", "lm_head"]
NAMES = {"GPTNeoX": ["embed_in", "lm_head"], "Bloom": ["word_embeddings", "lm_head"]}


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Those of models.rows with new tokens in prompts and completions; <x> is in none."""
    made = models.rows(count, seed)
    return [{"prompt": f"{row['prompt']} <think>", "completion": f" </think>{row['completion']}"} for row in made]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By kind: tables apart and tied, without a row to spare; tied with rows to spare; of a model that sees; and of
    other names than most have, apart (in files by other names still) and tied."""
    root = tmp_path_factory.mktemp("bases")
    for kind in ("apart", "tied"):
        model = models.llama(layers=2)
        if kind == "tied":
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(root / kind, max_shard_size="20KB")
        models.tokenizer("llama").save_pretrained(root / kind)
    models.save("qwen2", root / "spare")
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(seeing()).save_pretrained(root / "sees")
    models.tokenizer("llama").save_pretrained(root / "sees")
    for kind in NAMES:
        build(kind).save_pretrained(root / kind)
        models.tokenizer("llama").save_pretrained(root / kind)
    return {kind: root / kind for kind in ("apart", "tied", "spare", "sees", *NAMES)}


def seeing() -> Gemma3Config:
    """Towers beside a language model, whose tied embedding has a factor."""
    given = WRAPPED["gemma3"]().to_dict()
    given["text_config"]["vocab_size"] = models.VOCABULARY
    return Gemma3Config(
        **{key: given[key] for key in ("text_config", "vision_config", "mm_tokens_per_image")}, image_token_index=9
    )


def settings_of(base: Path, out: Path, **changes) -> dict:
    raw = settings(base, out, **{"lora__new_tokens": NEW, "train__max_steps": 6, "data__max_length": 64, **changes})
    for name, made in (("train", rows(100, 0)), ("eval", rows(21, 1))):
        write_json_lines(out.parent / "data" / f"{name}.jsonl", made)
    return raw


def plain(base: Path, adapter: Path | None, tokenizer: Path, **how):
    """What a user of PEFT would load: the base with as many rows as the tokenizer needs, and the adapter."""
    sees = "vision_config" in json.loads((base / "config.json").read_text())
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32)
    words = len(AutoTokenizer.from_pretrained(tokenizer))
    if words > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(words, mean_resizing=False)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter, **how)


def samples_of(tokenizer: Path, made: list[dict[str, str]]) -> list[dict]:
    tokenizer, samples = AutoTokenizer.from_pretrained(tokenizer), []
    for row in made:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        samples.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return samples


def eval_loss(model, samples: list[dict]) -> float:
    with torch.no_grad():
        return float(reference.mean_loss(model.eval(), samples).double())


def trained_by_peft(base: Path, adapter: Path, tokenizer: Path, raw: dict) -> list[float]:
    """Losses of a loop over PEFT's model from the run's initial adapter: plain autograd, torch's AdamW and clipping."""
    config = parse_config(raw)
    model = plain(base, adapter, tokenizer, is_trainable=True)
    samples, losses = samples_of(tokenizer, rows(100, 0)), []
    read = load_rows(config.data.train, config.data.train_split, None)
    documents = training_data(read, AutoTokenizer.from_pretrained(tokenizer), config.data)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    for step in range(config.train.max_steps):
        chosen = batches.global_batch(len(documents), config.train.global_batch_size, step, config.train.seed)
        loss = reference.mean_loss(model, [samples[row] for i in chosen for row in documents.rows_of(i)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.optim.lr * (1 - step / config.train.max_steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def largest_gap(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def killed(raw: dict, ranks: int, hosts: str, step: int, folder: Path) -> None:
    """A start of a run whose last rank dies by SIGKILL in its so manieth step: adapters have taken it, tables not."""
    folder.mkdir()
    point = Point("before tables", "train.rows.RowShardedTables.update", "", rank=ranks - 1, call=step)
    codes = [code for code, _ in run_commands(folder, ranks, job, raw, folder, point, False, hosts=hosts)]
    assert codes[-1] == -signal.SIGKILL
    assert 0 not in codes


def bytes_of(folder: Path) -> int:
    """Of all tensors in it."""
    return sum(tensor.nbytes for path in folder.rglob("*.safetensors") for tensor in load_file(path).values())


def resumed_from(out: Path) -> int:
    return json.loads((out / "run.json").read_text())["resumed_from"]


WHOLE = {"lora__modules_to_save": BOTH}
BESIDE_ADAPTED_HEAD = {
    "lora__modules_to_save": ["embed_tokens"],
    "lora__target_modules": ["q_proj", "lm_head"],
    "lora__new_tokens": None,
}
OFFLOAD = {"deepspeed__config": "ds_configs/zero3_offload.json"}
full = pytest.mark.full
CASES = [  # tables, settings, numbers of ranks
    pytest.param("apart", {}, (1, 2, 3), marks=full),
    ("tied", {}, (2,)),
    pytest.param("tied", {}, (1, 3), marks=full),
    pytest.param("tied", OFFLOAD, (2,), marks=full),
    pytest.param("apart", {"data__packing": True, **WHOLE}, (2,), marks=full),
    pytest.param("spare", {"data__packing": True}, (2,), marks=full),
    ("apart", WHOLE, (2,)),
    pytest.param("apart", WHOLE, (1, 3), marks=full),
    pytest.param("tied", WHOLE, (1, 2, 3), marks=full),
    pytest.param("sees", {}, (2,), marks=full),
    pytest.param("sees", WHOLE, (2,), marks=full),
    pytest.param("apart", {"lora__modules_to_save": ["lm_head"], "lora__new_tokens": None}, (2,), marks=full),
    pytest.param("apart", BESIDE_ADAPTED_HEAD, (2,), marks=full),
    *(pytest.param(kind, {"lora__modules_to_save": names}, (2,), marks=full) for kind, names in NAMES.items()),
]


@pytest.mark.parametrize(("kind", "changes", "ranks"), CASES)
def test_run(kind, changes, ranks, bases, tmp_path):
    """Every loss is that of PEFT's model in one process; so is what PEFT loads of the result, and the merged model.

    The run of the shorter suite is killed at 3 ranks and goes on at 2.
    """
    base = bases[kind]
    fixed = {"optim__preconditioner": "none", "optim__weight_decay": 0.1, **changes}
    outs = {}
    for count in ranks:
        outs[count] = tmp_path / f"{count}"
        raw = settings_of(base, outs[count], **fixed)
        if (kind, changes, count) == ("tied", {}, 2):
            raw["checkpoint"] = {"steps": 2}
            killed(raw, 3, "aab", 4, tmp_path / "killed")
        run_ranks(count, train, raw)
        assert resumed_from(outs[count]) == (2 if "checkpoint" in raw else None)
    out = outs[ranks[-1]]
    named = out / "adapter" if (out / "adapter" / "tokenizer.json").exists() else base
    truth = trained_by_peft(base, out / "adapter_init", named, settings_of(base, out, **fixed))
    gaps = [largest_gap(losses_of(other), truth) for other in outs.values()]
    last = metrics(out)[-1]["eval_loss"]
    planned = plan.shape_of(parse_config(raw))
    assert bytes_of(out / "checkpoints" / "step-6") == room.size_bytes(
        parse_config(raw), [*planned.targets, *planned.tables]
    )
    samples = samples_of(named, rows(21, 1))
    by_peft = eval_loss(plain(base, out / "adapter", named), samples)
    assert merge_adapter.main([str(base), str(out / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = eval_loss(plain(tmp_path / "merged", None, tmp_path / "merged"), samples)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    print(
        f"losses {truth[0]:.4f} to {truth[-1]:.4f}, gaps {gaps}; PEFT {by_peft - last:.1e}, merged {merged - last:.1e}"
    )
    assert config.get("text_config", config)["vocab_size"] == (
        64 if kind == "spare" or changes.get("lora__new_tokens", NEW) is None else 67
    )
    # fp32 sums in another order, carried through 6 steps. Measured: 8e-7.
    assert max(gaps) <= 1e-5
    assert abs(by_peft - last) <= 1e-5
    assert abs(merged - last) <= 1e-5


# Ranks, their hosts, shard group, in which step of its own the stage is killed.
STAGES = [(2, "ab", "node", 3), (3, "aab", "world", 3)]


@pytest.mark.full
@pytest.mark.parametrize("changes", [{}, WHOLE], ids=["rows", "whole"])
def test_goes_on_at_another_number_of_ranks(changes, bases, tmp_path):
    """Killed twice; under a method that changes the base and exports at rank 2r, with checkpointing of both kinds."""
    fixed = {"train__eval_steps": 3, "init__method": "lora_one_v1", "model__recompute": "all", **changes}
    straight, out = tmp_path / "straight", tmp_path / "run"
    run_ranks(2, train, settings_of(bases["tied"], straight, **fixed, model__checkpointing="reentrant"))
    raw = settings_of(bases["tied"], out, **fixed) | {"checkpoint": {"steps": 2}}
    for count, hosts, group, step in STAGES:
        raw["deepspeed"]["shard_group"] = group
        killed(raw, count, hosts, step, tmp_path / hosts)
    run_ranks(1, train, raw)
    assert resumed_from(out) == 4
    assert len(losses_of(out)) == 6
    ours, its = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, straight))
    gap = max(float((ours[name] - its[name]).abs().max() / its[name].abs().max()) for name in its)
    # As in test_resume: fp32 sums in another order, carried through the steps.
    assert largest_gap(losses_of(out), losses_of(straight)) <= 1e-5
    assert gap <= 1e-5
    by_peft = eval_loss(
        plain(bases["tied"], out / "adapter", out / "adapter"), samples_of(out / "adapter", rows(21, 1))
    )
    assert abs(by_peft - metrics(out)[-1]["eval_loss"]) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("changes", [{}, WHOLE], ids=["rows", "whole"])
def test_learns_to_answer_with_new_tokens(changes, bases, tmp_path):
    """In bf16 on two ranks: answers of new tokens alone, generated under ZeRO-3; the same bits at stage 0."""
    made = [{"prompt": f"w{3 + i % 9}", "completion": " <think>" if i % 9 % 2 else " </think>"} for i in range(40)]
    fixed = {"train__max_steps": 12, "train__exact_match_samples": 8, "optim__lr": 3e-2, "model__dtype": "bf16"}
    found = []
    for name in ("zero3", "stage0"):
        raw = settings_of(
            bases["tied"], tmp_path / name, **fixed, **changes, deepspeed__config=f"ds_configs/{name}.json"
        )
        for split in ("train", "eval"):
            write_json_lines(tmp_path / "data" / f"{split}.jsonl", made[: len(made) // 2 if split == "eval" else None])
        run_ranks(2, train, raw)
        found.append(metrics(tmp_path / name))
    assert [line.get("loss") for line in found[0]] == [line.get("loss") for line in found[1]]
    before, after = (found[0][place]["exact_match"] for place in (0, -1))
    assert (before, after > 0.4) == (0.0, True)


@pytest.mark.full
def test_a_tokenizer_with_more_tokens_than_the_model(bases, tmp_path):
    """Trains them unasked, as if the run had added them."""
    base = tmp_path / "base"
    shutil.copytree(bases["apart"], base)
    tokenizer = models.tokenizer("llama")
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(base)
    for folder, out, new in ((base, tmp_path / "theirs", None), (bases["apart"], tmp_path / "ours", NEW)):
        run_ranks(1, train, settings_of(folder, out, lora__new_tokens=new, train__max_steps=2))
    assert losses_of(tmp_path / "theirs") == losses_of(tmp_path / "ours")


@pytest.mark.full
@pytest.mark.parametrize("changes", [{}, WHOLE], ids=["rows", "whole"])
def test_begins_from_an_adapter_with_tables(changes, bases, tmp_path):
    run_ranks(2, train, settings_of(bases["apart"], tmp_path / "first", **changes, train__max_steps=2))
    given = tmp_path / "first" / "adapter"
    again = {**changes, "init__adapter": str(given), "train__max_steps": 0}
    run_ranks(2, train, settings_of(bases["apart"], tmp_path / "second", **again))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (given, tmp_path / "second" / "adapter_init"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (json.loads((tmp_path / n / "init_report.json").read_text()) for n in ("first", "second"))
    assert second["loss_before"] == pytest.approx(first["loss_before"], rel=1e-6), "without the given rows"
    assert second["loss_after"] < first["loss_after"]
    other = settings_of(bases["apart"], tmp_path / "third", **again | {"lora__new_tokens": ["<think>"]})
    assert "its rows of model.embed_tokens are others than the" in run_ranks(1, refused, other)[0]
    none = settings_of(bases["apart"], tmp_path / "third", init__adapter=str(given), lora__new_tokens=None)
    assert "merge it with tools/merge_adapter.py" in run_ranks(1, refused, none)[0]


@pytest.mark.full
def test_another_run_is_refused(bases, tmp_path):
    """By setting, and where the tokenizer has got more tokens."""
    base = tmp_path / "base"
    shutil.copytree(bases["apart"], base)
    run_ranks(1, train, settings_of(base, tmp_path / "run", train__max_steps=1))
    more = settings_of(base, tmp_path / "run", train__max_steps=1, lora__new_tokens=[*NEW, "<y>"])
    assert "lora.new_tokens is" in run_ranks(1, refused, more)[0]
    tokenizer = models.tokenizer("llama")
    tokenizer.add_tokens(["<y>"])
    tokenizer.save_pretrained(base)
    assert "trained rows" in run_ranks(1, refused, settings_of(base, tmp_path / "run", train__max_steps=1))[0]


@pytest.mark.full
@pytest.mark.alone
def test_peak_memory_and_wire_are_the_plans(tmp_path):
    """Of both forms on two ranks, 29 M parameters: every phase within 10 % of what is planned, and a step's wire."""
    harness.make_model(tmp_path / "base", phases.MODELS["30M"])
    for lora in ({"new_tokens": [f"<{i}>" for i in range(1000)]}, {"modules_to_save": BOTH}):
        raw = phases.write_run(tmp_path, "base", 2, "world", phases.ZERO, length=128)
        raw["lora"] |= lora
        config = parse_config(raw)
        cluster = Cluster(1, 2, bytes_per_rank=1e12, backend="gloo")
        prediction = predict(plan.shape_of(config), config, cluster)
        found = phases.compare(run_ranks(2, phases.measure, raw, False)[0], prediction, False)
        ratios = {row["phase"]: round(row["peak ratio"], 3) for row in found}
        print(list(lora), ratios, "wire of a step", round(found[-1]["all ratio"], 3))
        assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values())
        assert 0.9 <= found[-1]["all ratio"] <= 1.1
