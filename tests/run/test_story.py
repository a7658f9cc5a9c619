"""Whole runs through the same entry as users', at 1 to 4 ranks."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_one_dist.cluster import comm
from lora_one_dist.config.reading import parse_config
from lora_one_dist.data import batches
from tests import models, reference
from tests.base.checkpoints import changed, gpt2
from tests.ranks import run_commands, run_ranks, write_json_lines
from tests.runs import PATTERNS, metrics, peft_eval_loss, refused, settings, train


def test_whole_run(model_folder, tmp_path):
    out = tmp_path / "run"
    changes = {"train__max_steps": 30, "train__exact_match_samples": 7, "train__eval_steps": 12, "optim__lr": 1e-2}
    raw = settings(model_folder("llama"), out, **changes)
    summaries = run_ranks(2, train, raw)
    lines = metrics(out)
    assert summaries[0] == summaries[1]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 12, 24, 30]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.2
    assert {"exact_match", "eval_loss"} <= lines[-1].keys()
    assert {"lr", "grad_norm", "tokens_per_second", "peak_bytes", "slowest_rank", "fastest_rank"} <= steps[0].keys()
    assert parse_config(yaml.safe_load((out / "config.yaml").read_text())) == parse_config(raw)
    run = json.loads((out / "run.json").read_text())
    assert run["world_size"] == 2
    assert run["versions"]["deepspeed"]
    report = json.loads((out / "init_report.json").read_text())
    assert len(report["layers"]) == 28
    assert report["loss_after"] < report["loss_before"]
    assert (out / "init_report.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "peak_bytes"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in steps])


@pytest.mark.parametrize("method", ["lora_one", "lora_one_v1", "lora_ga", "pissa", "lora"])
def test_adapter_loads_in_peft_and_gives_the_eval_loss(method, model_folder, tmp_path):
    out = tmp_path / "run"
    folder = model_folder("llama")
    changes = {**PATTERNS, "init__method": method}
    if method in ("lora_one", "pissa"):
        named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        changes["lora__target_modules"] = named
    if method == "lora_ga":
        changes["lora__rank_pattern"] = {"v_proj": 2, "(k|gate)_proj": 16}
    run_ranks(2, train, settings(folder, out, **changes))
    last = metrics(out)[-1]
    assert last["eval_loss"] != metrics(out)[0]["eval_loss"]
    loss = peft_eval_loss(folder, out / "adapter", models.rows(21, seed=1), torch.float32)
    assert loss == pytest.approx(last["eval_loss"], abs=1e-5)
    described = json.loads((out / "adapter" / "adapter_config.json").read_text())
    times = 2 if method in ("lora_one_v1", "lora_ga", "pissa") else 1
    assert described["r"] == 4 * times
    narrow = 8 if method == "lora_ga" else 16
    assert described["rank_pattern"]["k_proj"] == narrow * times, "16 x 32, and LoRA-GA takes two vectors for each rank"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of a head that is tied
def test_adapter_of_transposed_layers_gives_the_eval_loss(tmp_path):
    """Of a GPT-2, from which PiSSA takes its start."""
    folder, out = tmp_path / "gpt2", tmp_path / "run"
    gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2).save_pretrained(folder)
    models.tokenizer("llama").save_pretrained(folder)
    run_ranks(2, train, settings(folder, out, init__method="pissa", lora__rank_pattern={"c_fc": 2}))
    assert metrics(out)[-1]["eval_loss"] < metrics(out)[0]["eval_loss"]
    loss = peft_eval_loss(folder, out / "adapter", models.rows(21, seed=1), torch.float32)
    assert loss == pytest.approx(metrics(out)[-1]["eval_loss"], abs=1e-5)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["fan_in_fan_out"], config["rank_pattern"]) == (True, {"c_fc": 4})


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.full) for m in ("lora", "lora_one", "lora_ga", "lora_one_v1", "pissa")],
)
def test_bf16_adapter_gives_the_eval_loss(method, tmp_path):
    """On a base that was trained: bf16 logits of a random one are noise of 1e-3 by themselves."""
    out, demo = tmp_path / "run", Path("launch/demo")
    raw = settings(demo / "model", out, init__method=method, model__dtype="bf16", train__micro_batch_size=4)
    raw["data"] = {"train": str(demo / "data/train.jsonl"), "eval": str(demo / "data/eval.jsonl")}
    run_ranks(2, train, raw)
    rows = [json.loads(line) for line in (demo / "data/eval.jsonl").read_text().splitlines()]
    gap = peft_eval_loss(demo / "model", out / "adapter", rows, torch.bfloat16) - metrics(out)[-1]["eval_loss"]
    print(f"bf16 {method}: PEFT's eval loss minus the run's: {gap:+.2e}")
    # The compensating methods round W - s B0 A0 to bf16, which no adapter can undo: their gap is reported, and held
    # only below what a wrong sign or scale would give.
    assert abs(gap) <= (1e-3 if method in ("lora", "lora_one") else 5e-2)


@pytest.fixture(scope="module")
def losses_by_ranks(model_folder, tmp_path_factory):
    """Losses of 20 steps at a number of ranks: 11 samples in micro-batches of 2 divide by none."""

    @functools.cache
    def losses(world_size: int) -> list[float]:
        out = tmp_path_factory.mktemp("ranks") / str(world_size) / "run"
        run_ranks(world_size, train, settings(model_folder("qwen2"), out, train__max_steps=20))
        return [line["loss"] for line in metrics(out) if "loss" in line]

    return losses


@pytest.mark.parametrize("world_size", [3, *(pytest.param(count, marks=pytest.mark.full) for count in (2, 4))])
def test_losses_do_not_depend_on_the_ranks(world_size, losses_by_ranks):
    # 1e-5 absolute is the bound: fp32 sums in another order, carried through 20 steps.
    assert losses_by_ranks(world_size) == pytest.approx(losses_by_ranks(1), abs=1e-5, rel=0)
    assert len(losses_by_ranks(world_size)) == 20


@pytest.mark.full
@pytest.mark.parametrize("hosts", ["aabb", "abcd", "aaab"])
def test_losses_have_the_same_bits_with_a_copy_of_the_base_on_each_host(hosts, model_folder, tmp_path):
    losses = []
    for shard_group, where in (("world", "aaaa"), ("node", hosts)):
        changes = {"data__eval": None, "train__max_steps": 4, "deepspeed__shard_group": shard_group}
        raw = settings(model_folder("qwen2"), tmp_path / where, **changes)
        run_ranks(4, train, raw, hosts=where)
        losses.append([(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / where) if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_losses_do_not_depend_on_micro_batch_stage_and_checkpointing(model_folder, tmp_path, losses_by_ranks):
    changes = {"train__max_steps": 20, "train__micro_batch_size": 4, "model__checkpointing": "reentrant"}
    raw = settings(model_folder("qwen2"), tmp_path / "run", deepspeed__config="ds_configs/stage0.json", **changes)
    run_ranks(2, train, raw)
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    # The init batch is dealt in other micro-batches too; its mean is over tokens all the same.
    assert losses == pytest.approx(losses_by_ranks(1), abs=1e-5, rel=0)


def test_first_loss_is_the_token_mean_of_the_global_batch(model_folder, tmp_path):
    """Plain LoRA leaves the model alone, so step 1 sees the pre-trained loss of the first global batch."""
    raw = settings(model_folder("llama"), tmp_path / "run", init__method="lora", train__max_steps=1)
    run_ranks(3, train, raw)
    loss = next(line["loss"] for line in metrics(tmp_path / "run") if "loss" in line)
    tokenizer = models.tokenizer("llama")
    samples = []
    for index in batches.global_batch(100, 11, 0, seed=0):
        row = models.rows(100)[index]
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        samples.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    assert len({sum(label != -100 for label in sample["labels"]) for sample in samples}) > 1, "uneven samples"
    expected = reference.mean_loss(models.llama().double(), samples).item()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_init_only_and_start_from_an_adapter(model_folder, tmp_path):
    folder = model_folder("llama")
    first, second, straight = (tmp_path / name for name in ("init", "continued", "straight"))
    run_ranks(2, train, settings(folder, first, train__max_steps=0, **PATTERNS))
    assert sorted(path.name for path in first.iterdir()) == [
        ".lock",
        "adapter_init",
        "checkpoints",
        "config.yaml",
        "init_report.json",
        "init_report.png",
        "metrics.jsonl",
        "run.json",
        "summary.json",
        "tensorboard",
    ]
    raw = settings(folder, second, **PATTERNS)
    raw["init"] = {"adapter": str(first / "adapter_init")}
    run_ranks(2, train, raw)
    run_ranks(2, train, settings(folder, straight, **PATTERNS))
    losses = [[line["loss"] for line in metrics(out) if "loss" in line] for out in (second, straight)]
    assert losses[0] == losses[1], "the same bits: the adapter is fp32 on disk"


def test_given_adapter_must_fit(model_folder, tmp_path):
    folder = model_folder("llama")
    run_ranks(1, train, settings(folder, tmp_path / "init", train__max_steps=0))
    raw = settings(folder, tmp_path / "other", lora__r=8, lora__target_modules=["q_proj", "v_proj"])
    raw["init"] = {"adapter": str(tmp_path / "init" / "adapter_init")}
    message = run_ranks(1, refused, raw)[0]
    assert "r is 4, the run's is 8" in message
    assert "must be (8, 32)" in message
    assert "40 of its tensors belong to no target" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora__r": 40}, "lora.r = 40: must be at most min(m, n) = 32"),
        ({"lora__r": 17, "init__method": "lora_ga"}, "this init.method takes 34 singular vectors"),
        ({"lora__target_modules": ["q_porj"]}, "'q_porj' matches no layer. Did you mean q_proj"),
        ({"lora__target_modules": ["input_layernorm"]}, "is a LlamaRMSNorm; only nn.Linear"),
        ({"train__global_batch_size": 200}, "train.global_batch_size = 200: the training data has 100 samples"),
        ({"init__num_samples": 200}, "init.num_samples = 200: the training data has 100 samples"),
        ({"data__prompt": "{question}"}, "question"),
    ],
)
def test_refused_before_a_weight_is_read(changes, expected, model_folder, tmp_path):
    for message in run_ranks(2, refused, settings(model_folder("llama"), tmp_path / "run", **changes)):
        assert expected in message
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def refused_in_turn(by_host):
    """Runs on a rank: the errors of runs that must not start, whose settings are those of the rank's host."""
    return [refused(raw) for raw in by_host[socket.gethostname()]]


def test_what_hosts_do_not_share_is_refused_before_a_weight_is_read(model_folder, tmp_path):
    """A base that cannot be sliced, in each host; training data, evaluation data, a base that only one host has."""

    def run(base=None, **changes):
        return settings(base or model_folder("llama"), tmp_path / "run", **changes)

    def copy(name, change):
        (tmp_path / name).mkdir()
        return changed(model_folder("llama"), tmp_path / name, change)

    def of_bytes(held):
        return held | {"model.norm.weight": held["model.norm.weight"].to(torch.int8)}

    unsliced = run(copy("unsliced", of_bytes), deepspeed__shard_group="node")
    more = write_json_lines(tmp_path / "more.jsonl", models.rows(101))
    edited = models.rows(21, seed=1)
    edited[20]["completion"] += " w3"
    edited = write_json_lines(tmp_path / "edited.jsonl", edited)
    own = {
        "a": [unsliced, run(), run(), run(copy("base", dict))],
        "b": [
            *(unsliced, run(data__train=str(more)), run(data__eval=str(edited))),
            run(copy("other", lambda held: {name: 2 * tensor for name, tensor in held.items()})),
        ],
    }
    for messages in run_ranks(2, refused_in_turn, own, hosts="ab"):
        assert "failed while checking the model: deepspeed.shard_group = node: needs tensors that" in messages[0]
        unlike = (
            "failed while comparing what the hosts have read: {}: must be the same on every host, is a: {}; b: {}. "
        )
        number = r"samples {}, sha256 [0-9a-f]{{12}}"
        for message, what, counts in zip(
            messages[1:3], ("data.train", "data.eval"), ((100, 101), (21, 21)), strict=True
        ):
            pattern = unlike.format(what, *(number.format(count) for count in counts))
            assert re.search(pattern + "Give each the same files and the same tokenizer, by copies or a file", message)
        assert re.search(unlike.format("model.path", "config .*", "config .*") + "Copy the model from one", messages[3])
    assert not (tmp_path / "run").exists()


def test_used_output_folder_is_refused(model_folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("x")
    for message in run_ranks(2, refused, settings(model_folder("llama"), out)):
        assert "exists and is not empty" in message
    assert [path.name for path in out.iterdir()] == ["precious"]


def one_rank_cannot_read(raw):
    from lora_one_dist.run import inputs, story

    if os.environ["RANK"] == "1":

        def broken(*_):
            raise OSError("stale file handle")

        inputs.load_rows = broken
    try:
        story.run(parse_config(raw))
    except comm.RankError as error:
        return str(error)
    return "ran"


def test_data_that_one_rank_cannot_read_stops_all(model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run")
    for message in run_ranks(2, one_rank_cannot_read, raw):
        assert message.startswith("rank 1 on")
        assert message.endswith("stale file handle")


def one_rank_fails(raw, module, function):
    """Runs on a rank: ``module.function`` raises on rank 1 alone; the error that this rank ends with."""
    import importlib

    from lora_one_dist.run import story

    if os.environ["RANK"] == "1":

        def broken(*_args, **_kwargs):
            raise OSError("stale file handle")

        setattr(importlib.import_module(f"lora_one_dist.{module}"), function, broken)
    try:
        story.run(parse_config(raw))
    except comm.RankError as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize(
    ("module", "function", "doing"),
    [
        ("base.sharding", "_read_own", "reading the base"),
        ("initialise.spectral", "truncated_svd", "initialising adapters"),
    ],
)
def test_failure_of_one_rank_stops_all_with_its_message(module, function, doing, model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run")
    for message in run_ranks(2, one_rank_fails, raw, module, function):
        assert message.startswith("rank 1 on")
        assert f"failed while {doing}: OSError: stale file handle" in message


def test_failure_of_one_rank_in_its_update_ends_all_with_its_message(model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run")
    ended = run_commands(tmp_path, 2, one_rank_fails, raw, "train.precondition", "_damped_inverse")
    assert all(code != 0 for code, _ in ended)
    assert all(re.search(r"^rank 1 on \S+ failed: OSError: stale file handle", said, re.M) for _, said in ended)


def test_pattern_that_finds_no_answer_is_refused(model_folder, tmp_path):
    raw = settings(model_folder("llama"), tmp_path / "run", train__exact_match_samples=3)
    raw["train"]["exact_match_pattern"] = "answer is (.*)"
    for message in run_ranks(1, refused, raw):
        assert "finds no answer in the completion of " in message
        assert "eval.jsonl, line 1, " in message


def test_micro_batch_mean_does_not_depend_on_the_halves(model_folder, tmp_path):
    folder = model_folder("llama")
    losses = []
    for halves in (True, False):
        out = tmp_path / str(halves)
        raw = settings(folder, out, init__average="micro_batch", init__halves=halves, train__max_steps=0)
        raw["train"]["micro_batch_size"] = 3
        run_ranks(2, train, raw)
        report = json.loads((out / "init_report.json").read_text())
        losses.append(report["loss_before"])
        assert (report["layers"][0]["half_overlap"] is not None) == halves
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
