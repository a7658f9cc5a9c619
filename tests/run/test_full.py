"""Runs that train every weight: against one process, at 1 to 4 ranks, stopped, killed, exported, planned, refused."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one_dist.commands import plan
from lora_one_dist.config.optim import OptimConfig
from lora_one_dist.config.reading import ConfigError, parse_config
from lora_one_dist.config.settings import TrainConfig
from lora_one_dist.data import batches
from lora_one_dist.run import room
from tests import models, reference
from tests.kill_harness import Point, job
from tests.ranks import run_commands, run_ranks
from tests.run.test_kinds import train_each
from tests.run.test_resume import losses_of, rare_data, train_with_a_fault
from tests.run.test_tables import bytes_of, largest_gap, resumed_from, samples_of
from tests.runs import metrics, refused, settings
from tools.bench import harness, phases

STEPS = 20
TOLERANCE = 1e-5  # of the loss: fp32 rounds each weight to 6e-8, and 20 steps of AdamW carry it on
CHEAP = "let go"
STAGE_0 = "ds_configs/stage0.json"
LONGER = {"data__max_length": 64}  # its tokens are characters
CASES = {  # model, settings; 11 samples a batch in micro-batches of 2: at 2 to 4 ranks some rank has none of its own
    "llama": ("llama", {}),
    "tied": ("qwen2", {"model__recompute": "all", **LONGER}),
    "reentrant": ("llama", {"model__recompute": "all", "model__checkpointing": "reentrant"}),
    "stage 0": ("qwen2", {"deepspeed__config": STAGE_0, **LONGER}),
    "let go": ("llama", {"deepspeed__config": "let_go", "model__recompute": "all"}),
    "layer by layer": ("qwen2", {"deepspeed__config": "layer_by_layer", **LONGER}),
    "sgd": ("llama", {"optim__name": "sgd", "optim__lr": 5e-2}),
}
ZERO = {  # as in a model whose blocks are large: nothing stays gathered; and a block is not gathered as a whole
    "let_go": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    "layer_by_layer": {"stage3_param_persistence_threshold": 40, "stage3_max_live_parameters": 0},
}
FIXED = {"train__mode": "full", "train__max_steps": STEPS, "optim__weight_decay": 0.1, "optim__lr": 1e-3}


def cases_at(ranks: int) -> dict[str, tuple[str, dict]]:
    """Those that are tried: all at 2 ranks."""
    return {name: case for name, case in CASES.items() if ranks == 2 or name in (CHEAP, "tied", "stage 0")}


def settings_of(base: Path, out: Path, **changes) -> dict:
    raw = settings(base, out, **{**FIXED, **changes})
    if (zero := ZERO.get(raw["deepspeed"]["config"])) is not None:
        raw["deepspeed"]["config"] = models.deepspeed_config("zero3", **zero).config
    del raw["lora"], raw["init"], raw["optim"]["preconditioner"]
    return raw


def losses_in_one_process(base: Path, raw: dict) -> list[float]:
    """Plain autograd, torch's AdamW (or SGD) on all parameters and clipping, all in float64."""
    config = parse_config(raw)
    return _losses_in_one_process(base, config.optim, config.train)


@functools.cache
def _losses_in_one_process(base: Path, optim: OptimConfig, train: TrainConfig) -> list[float]:
    model, losses = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), []
    parameters = list(model.parameters())
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(parameters, eps=optim.eps, weight_decay=optim.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters)
    samples = samples_of(base, models.rows(100))
    for step in range(STEPS):
        chosen = batches.global_batch(len(samples), train.global_batch_size, step, train.seed)
        loss = reference.mean_loss(model, [samples[i] for i in chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        rate = optim.lr * (1 - step / STEPS)
        optimizer.param_groups[0]["lr"] = rate
        if optim.name == "sgd":
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(1 - rate * optim.weight_decay)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def exported_loss(folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Of the held-out rows, in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return float(reference.mean_loss(model, samples_of(folder, models.rows(21, seed=1))).double())


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """By case the folder of a whole run at a number of ranks; each number's are made once, and the cheap one apart."""
    made: dict[tuple[int, bool], Path] = {}

    def at(ranks: int, case: str) -> Path:
        key = (ranks, case == CHEAP)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("full") / "data-beside"
            raws = [
                settings_of(model_folder(kind), made[key] / name, **changes)
                for name, (kind, changes) in cases_at(ranks).items()
                if (name == CHEAP) == key[1]
            ]
            run_ranks(ranks, train_each, raws)
        return made[key] / case

    return at


full = pytest.mark.full


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, CHEAP),
        *(pytest.param(n, case, marks=full) for n in (1, 2, 3, 4) for case in cases_at(n) if (n, case) != (2, CHEAP)),
    ],
)
def test_losses_are_those_of_one_process_in_float64_and_the_export_gives_the_last(case, ranks, runs, model_folder):
    kind, changes = CASES[case]
    out, base = runs(ranks, case), model_folder(kind)
    truth = losses_in_one_process(base, settings_of(base, out, **changes))
    gap, last = largest_gap(losses_of(out), truth), metrics(out)[-1]["eval_loss"]
    by_transformers = exported_loss(out / "model")
    print(f"losses {truth[0]:.4f} to {truth[-1]:.4f}, gap {gap:.1e}; exported {by_transformers - last:.1e}")
    assert last < metrics(out)[0]["eval_loss"] - 0.05
    assert gap <= TOLERANCE * truth[0]
    assert abs(by_transformers - last) <= TOLERANCE * last
    assert not (out / "adapter").exists()
    assert sorted(path.name for path in (out / "checkpoints" / "step-20" / "model").iterdir()) == sorted(
        path.name for path in (out / "model").iterdir() if path.name != "manifest.json"
    )
    raw = parse_config(settings_of(base, out, **changes))
    elements = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert bytes_of(out / "checkpoints" / "step-20") == room.size_of_full(raw, elements)
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


PATHS = [(1, "a", 3), (2, "ab", 8), (4, "aabb", 13), (3, "aab", 17), (1, "a", 0)]  # ranks, hosts, step of the stop


@full
@pytest.mark.parametrize("case", ["let go", "stage 0"])
def test_goes_on_at_other_numbers_of_ranks_and_after_a_kill(case, runs, model_folder, tmp_path):
    """Also where ranks of two hosts do not lie in the order of the collectives' places."""
    kind, changes = CASES[case]
    out = tmp_path / "runs" / "moved"
    raw = {**settings_of(model_folder(kind), out, **changes), "checkpoint": {"steps": 2}}
    for ranks, hosts, stop in PATHS:
        ended = run_ranks(ranks, train_each, [raw], stop, hosts=hosts)
        assert ended == [["stopped" if stop else "20"]] * ranks
        if ranks == 2:
            (tmp_path / "killed").mkdir()
            point = Point("in an update", "train.full.FullOptimizer._share", "", rank=1, call=4)  # the first resumes
            codes = [
                code for code, _ in run_commands(tmp_path / "killed", 2, job, raw, tmp_path / "killed", point, False)
            ]
            assert codes[1] == -signal.SIGKILL
            assert 0 not in codes
        if ranks == 4:
            assert resumed_from(out) == 10, "killed in step 11, saved at 10"
    straight = losses_of(runs(2, case))
    gap = largest_gap(losses_of(out), straight)
    print(f"gap {gap:.1e}")
    assert gap <= TOLERANCE * straight[0]
    assert exported_loss(out / "model") == pytest.approx(metrics(out)[-1]["eval_loss"], rel=TOLERANCE)


@full
def test_bf16_keeps_fp32_masters_and_an_encoder_is_trained_too(model_folder, tmp_path):
    """Of bf16 the loss of the export, in bf16, is the run's; masters hold more than it."""
    half, two = tmp_path / "runs" / "bf16", tmp_path / "runs" / "t5"
    raws = [
        settings_of(model_folder("llama"), half, model__dtype="bf16"),
        settings_of(model_folder("t5"), two, optim__lr=1e-2),
    ]
    run_ranks(2, train_each, raws)
    described = json.loads((half / "model" / "config.json").read_text())
    assert described["dtype"] == "bfloat16"
    last = metrics(half)[-1]["eval_loss"]
    assert exported_loss(half / "model", torch.bfloat16) == pytest.approx(last, rel=2**-7)  # a product rounds to 2^-9
    assert last < metrics(half)[0]["eval_loss"] - 0.05
    assert metrics(two)[-1]["eval_loss"] < metrics(two)[0]["eval_loss"] - 0.05


@full
def test_step_that_is_not_finite_is_explained_on_all_ranks(model_folder, tmp_path):
    """Every rank holds a part of each gradient; those whose own samples are at fault are named alone."""
    raw = settings_of(model_folder("llama"), tmp_path / "data" / "run", data__eval=None, train__global_batch_size=12)
    raw["data"]["train"], raw["train"]["micro_batch_size"] = str(rare_data(tmp_path, 8)), 1
    messages = run_ranks(2, train_with_a_fault, {**raw, "checkpoint": {"steps": 2}}, "embedding")
    assert messages[0] == messages[1]
    for text in ("the loss of step 4 is nan", "embed_tokens for the samples at ", "The newest checkpoint is step-2."):
        assert text in messages[0]
    assert messages[0].count("rare.jsonl, line ") == 1
    assert "rare.jsonl, line 8" in messages[0]


# Refused --------------------------------------------------------------------------------------------------------------


def test_settings_of_adapters_have_no_effect(model_folder, tmp_path):
    """Refused in a file; left out, with a note, where the command line asks for another mode."""
    raw = settings_of(model_folder("llama"), tmp_path / "out")
    adapters = {"lora": {"r": 4, "new_tokens": ["<x>"]}, "init": {"method": "pissa"}}
    optim = {**raw["optim"], "preconditioner": "none", "lr_ratio_b": 2.0}
    given = {**raw, **adapters, "optim": optim}
    given["deepspeed"] = {"config": "ds_configs/zero3_offload.json", "shard_group": "node"}
    given["train"] = {**raw["train"], "max_steps": 0}
    with pytest.raises(ConfigError) as found:
        parse_config(given)
    keys = {problem.partition(" = ")[0] for problem in found.value.problems}
    assert keys == {
        *("lora.r", "lora.new_tokens", "init.method", "optim.preconditioner", "optim.lr_ratio_b"),
        *("deepspeed.shard_group", "deepspeed.config", "train.max_steps"),
    }
    plain = {**raw, **adapters, "optim": optim, "train": {**raw["train"], "mode": "lora"}}
    said: list[str] = []
    assert parse_config(plain, ["train.mode=full"], said.append).lora.r == 8
    assert len(said) == 5


def test_what_cannot_be_trained_whole_is_refused_before_a_weight_is_read(runs, model_folder, tmp_path):
    """A tokenizer with more tokens than rows; a memory that is too small; a run of another mode."""
    base = model_folder("llama")
    longer = tmp_path / "longer"
    models.llama().save_pretrained(longer)
    tokenizer = models.tokenizer("llama")
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(longer)
    out = tmp_path / "runs" / "out"
    raws = [
        settings_of(longer, out),
        settings_of(base, out, model__memory_gb=1e-4),
        settings(base, runs(2, CHEAP), train__max_steps=STEPS),
    ]
    messages = run_ranks(1, refused_each, raws)[0]
    assert "has 1 tokens more than the model's 64 rows. Resize the model first" in messages[0]
    assert "step needs" in messages[1]
    assert "the run does not fit" in messages[1]
    assert "is of another run: " in messages[2]
    assert "train.mode is lora, was full" in messages[2]


def refused_each(raws: list[dict]) -> list[str]:
    """Runs on a rank."""
    return [refused(raw) for raw in raws]


# Planned --------------------------------------------------------------------------------------------------------------


@full
@pytest.mark.alone
@pytest.mark.parametrize(("zero", "recompute"), [("stage 3", "all"), ("stage 0", "none")])
def test_memory_is_as_planned(zero, recompute, tmp_path):
    """Of a Llama of 25 M parameters at 2 ranks."""
    harness.make_model(tmp_path / "30M", phases.MODELS["30M"])
    raw = phases.write_run(tmp_path, "30M", 2, "world", phases.ZERO, 256)
    del raw["lora"], raw["init"]
    raw["train"]["mode"], raw["model"]["recompute"] = "full", recompute
    if zero == "stage 0":
        raw["deepspeed"] = {"config": STAGE_0}
    planned, measured = phases.predicted(raw, 1, 2), run_ranks(2, phases.measure, raw, False)[0]
    for phase in ("load", "step"):
        ratio = measured[phase]["peak"] / planned.peak(phase)
        print(f"{phase}: {measured[phase]['peak'] / 2**20:.1f} MiB, {ratio:.2f} of the plan")
        assert 0.85 <= ratio <= 1.1
    assert 0.95 <= measured["step"]["inside"] / planned.wire["step"].inside <= 1.05


def test_the_command_plans_it_too(capsys):
    assert plan.main(["--model", "tools/shapes/llama-3.1-8b", "--gpu_gb", "80", "train.mode=full"]) == 0
    said = capsys.readouterr().out
    assert "8.03 B parameters, all are trained" in said
    # 8.03e9 parameters on 8 ranks: 2 bytes of weights, 4 of gradients, 12 of masters and moments.
    assert "states 12.05" in said
    assert "gradients 4.02" in said
    assert "base 2.01" in said
    assert (
        plan.main(["--model", "tools/shapes/llama-3.3-70b", "--gpu_gb", "80", "train.mode=full"]) == plan.DOES_NOT_FIT
    )
