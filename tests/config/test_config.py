"""One run's settings: what is accepted, and each refusal with key, value, rule and remedy."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_one_dist.config.reading import ConfigError, load_config, parse_config
from lora_one_dist.config.settings import Config

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = ("lora_one", "lora_one_v1", "lora_ga", "pissa", "lora")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A launch folder with a model, data, an adapter and the shipped ZeRO files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "ds_configs", "ds_configs")
    for name in (
        "base/config.json",
        "adapter/adapter_config.json",
        "train.jsonl",
        "eval.jsonl",
        "eval.csv",
        "rows.txt",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")
    Path("empty").mkdir()
    return tmp_path


def valid(**changes: Any) -> dict[str, Any]:
    """The smallest config that loads; ``changes`` are dotted keys with __ for the dot."""
    raw: dict[str, Any] = {
        "model": {"path": "base"},
        "data": {"train": "train.jsonl"},
        "train": {"max_steps": 10},
        "output_dir": "out",
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            raw.setdefault(group, {})[name] = value
        else:
            raw[group] = value
    return raw


def problems(raw: dict[str, Any]) -> list[str]:
    try:
        parse_config(raw)
    except ConfigError as error:
        return error.problems
    return []


ADALORA = {"lora__kind": "adalora", "lora__use_rslora": False, "init__method": "lora"}


def write(raw: dict[str, Any], **policy: Any) -> dict[str, Any]:
    """The config with a ZeRO JSON of this content."""
    Path("policy.json").write_text(json.dumps(policy))
    return {**raw, "deepspeed": {"config": "policy.json"}}


# What loads -----------------------------------------------------------------------------------------------------------


def test_defaults_are_as_documented(here):
    config = parse_config(valid())
    assert (config.lora.r, config.lora.alpha, config.lora.use_rslora) == (8, 16.0, True)
    assert (config.init.method, config.gamma, config.init.num_samples) == ("lora_one", 128.0, 8)
    assert (config.optim.name, config.optim.lr, config.optim.damping_in_force) == ("adamw", 2e-4, 1.0)
    assert (config.optim.form, config.optim.lr_ratio_b, config.optim.betas) == ("rescaled", 1, (0.9, 0.999))
    assert (config.model.dtype, config.train.global_batch_size, config.data.max_length) == ("bf16", 32, 1024)
    assert config.deepspeed.stage == 3


@pytest.mark.parametrize(
    "changes",
    [
        *[{"init__method": method} for method in METHODS],
        *[{"init__method": "lora_ga", "init__scheme": scheme} for scheme in ("arb2r", "arbr", "a2rbr")],
        {"init__method": "lora_ga", "init__scheme": "random", "init__gamma": 64},
        {"init__method": "lora_ga", "init__stable_output": False},
        {"init__adapter": "adapter"},
        {"data__format": "chat", "data__loss_on": "all"},
        {"data__format": "text"},
        {"data__train": ["train.jsonl", "eval.csv"], "data__eval": "some-org/some.set", "train__eval_steps": 3},
        {"data__prompt": 'Q: "{query}"\n{{A}}: ', "data__completion": " é{answer}", "lora__target_modules": ["q_proj"]},
        {"optim__name": "sgd", "optim__preconditioner": "none"},
        {"train__max_steps": None, "train__epochs": 0.5},
        {"train__exact_match_samples": 4, "train__exact_match_pattern": r"is (\d+)\.", "data__eval": "eval.jsonl"},
        {"optim__warmup_steps": 9, "optim__schedule": "constant"},
        {"train__max_steps": 0, "optim__warmup_steps": 10},
        {"train__max_steps": 0, "train__epochs": 2},
        {"init__svd_tolerance": 3e-7, "optim__betas": [0.5, 0.0]},
        {"data__packing": True, "data__eval_fraction": 0.05, "train__eval_steps": 3, "train__exact_match_samples": 4},
    ],
    ids=str,
)
def test_resolved_yaml_loads_to_the_same_config(changes, here):
    config = parse_config(valid(**changes))
    Path("resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config("resolved.yaml") == config, "defaults that are written out must not be refused"
    for key, value in changes.items():
        group, _, name = key.partition("__")
        assert yaml.safe_load(config.to_yaml())[group][name] == value


def test_scientific_notation_without_a_point_is_a_number(here):
    # PyYAML reads 2e-4 as a string: YAML 1.1 asks for a point.
    Path("run.yaml").write_text(yaml.safe_dump(valid()) + "optim:\n  lr: 2e-4\n  eps: 1e-10\n  betas: [9e-1, .95]\n")
    config = load_config("run.yaml", ["optim.preconditioner=rescaled", "optim.damping=3E+1"])
    assert (config.optim.lr, config.optim.eps, config.optim.damping) == (2e-4, 1e-10, 30.0)
    assert config.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("override", "group", "key", "value"),
    [
        ("lora.r=16", "lora", "r", 16),
        ("--lora.r=16", "lora", "r", 16),
        ("lora.use_rslora=false", "lora", "use_rslora", False),
        ("lora.target_modules=[q_proj, self_attn.v_proj]", "lora", "target_modules", ["q_proj", "self_attn.v_proj"]),
        ("data.eval=null", "data", "eval", None),
        ("data.train=[train.jsonl, eval.jsonl]", "data", "train", ["train.jsonl", "eval.jsonl"]),
        (r'data.prompt="Q: {query}\nA="', "data", "prompt", "Q: {query}\nA="),
        ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
        ("train.micro_batch_size=4", "train", "micro_batch_size", 4),
        ("output_dir=elsewhere", None, "output_dir", "elsewhere"),
    ],
)
def test_override_replaces_one_setting(override, group, key, value, here):
    raw = valid(data__eval="eval.jsonl", train__micro_batch_size=2, lora__alpha=4)
    Path("run.yaml").write_text(yaml.safe_dump(raw))
    before = load_config("run.yaml").model_dump()
    after = load_config("run.yaml", [override]).model_dump()
    held = after if group is None else after[group]
    assert held[key] == value
    held[key] = (before if group is None else before[group])[key]
    assert after == before, "nothing else changed"


def test_last_override_wins_and_opens_a_group_that_is_absent_or_empty(here):
    Path("run.yaml").write_text(yaml.safe_dump(valid()) + "optim:\n")
    config = load_config("run.yaml", ["lora.r=2", "lora.r=32", "optim.lr=1"])
    assert (config.lora.r, config.optim.lr) == (32, 1.0)


DAMPED = {"optim__preconditioner": "riemannian", "optim__damping": 0.1}
WINS = [
    # the YAML, overrides, what they set, and the settings of the YAML that are left out
    (DAMPED, ["optim.preconditioner=none"], {"optim.preconditioner": "none"}, ["optim.damping"]),
    (DAMPED, ["optim.damping=null"], {"optim.damping": None}, []),
    (DAMPED, ["optim.damping=null", "optim.preconditioner=none"], {"optim.damping": None}, []),
    ({"optim__betas": [0.8, 0.9], "optim__eps": 1e-6}, ["optim.name=sgd"], {}, ["optim.betas", "optim.eps"]),
    ({"init__gamma": 9, "init__layer_groups": 2}, ["init.method=pissa"], {"init.layer_groups": 2}, ["init.gamma"]),
    (
        {"init__method": "lora_ga", "init__scheme": "arbr"},
        ["init.method=lora"],
        {"init.method": "lora"},
        ["init.scheme"],
    ),
    (
        {"init__method": "lora_ga", "init__gamma": 9},
        ["init.stable_output=false"],
        {"init.method": "lora_ga"},
        ["init.gamma"],
    ),
    ({"init__method": "lora_ga"}, ["init.adapter=adapter"], {"init.adapter": "adapter"}, ["init.method"]),
    ({}, ["train.epochs=2"], {"train.epochs": 2.0, "train.max_steps": None}, ["train.max_steps"]),
    ({"train__max_steps": None, "train__epochs": 2}, ["train.max_steps=5"], {"train.epochs": None}, ["train.epochs"]),
    ({"train__max_steps": None, "train__epochs": 2}, ["train.max_steps=0"], {"train.epochs": 2.0}, []),
    (
        {"data__eval": "some-org/set", "data__eval_split": "dev", "train__eval_steps": 3},
        ["data.eval_fraction=0.5"],
        {"data.eval": None, "train.eval_steps": 3},
        ["data.eval", "data.eval_split"],
    ),
    (
        {"data__eval": "eval.jsonl", "train__eval_steps": 3, "train__exact_match_samples": 4},
        ["data.eval=null"],
        {"data.eval": None},
        ["train.eval_steps", "train.exact_match_samples"],
    ),
    ({"data__prompt": "{q} "}, ["data.format=chat"], {"data.prompt": "{prompt}"}, ["data.prompt"]),
    ({"optim": {"lr": 1.0, "eps": 1e-6}}, ["optim=null"], {"optim.lr": 2e-4, "optim.eps": 1e-8}, []),
]


@pytest.mark.parametrize(("yaml_has", "overrides", "holds", "left_out"), WINS, ids=[str(row[1]) for row in WINS])
def test_override_wins_over_the_yaml_and_says_what_it_leaves_without_effect(yaml_has, overrides, holds, left_out, here):
    notes: list[str] = []
    config = parse_config(valid(**yaml_has), overrides, notes.append)
    values = config.model_dump()
    assert {key: values[key.partition(".")[0]][key.partition(".")[2]] for key in holds} == holds
    assert [note.split(" = ")[0] for note in notes] == [f"note: {key}" for key in left_out]
    assert all(note.endswith("as the command line has it") for note in notes)


@pytest.mark.parametrize(
    ("yaml_has", "overrides"),
    [
        ({}, ["optim.preconditioner=none", "optim.damping=0.1"]),  # both on the command line
        ({"optim__preconditioner": "none", "optim__damping": 0.1}, ["lora.r=4"]),  # both in the YAML
        ({"optim__preconditioner": "none"}, ["optim.damping=0.1"]),  # to drop the YAML's would change what is run
    ],
)
def test_setting_that_its_own_source_leaves_without_effect_is_refused(yaml_has, overrides, here):
    with pytest.raises(ConfigError, match=r"optim.damping = 0.1: has no effect with optim.preconditioner none"):
        parse_config(valid(**yaml_has), overrides)


@pytest.mark.parametrize(("method", "gamma"), zip(METHODS, (128.0, 64.0, 16.0, 1.0, 1.0), strict=True))
def test_gamma_is_the_methods_own_unless_given(method, gamma, here):
    assert parse_config(valid(init__method=method)).gamma == gamma
    if method not in ("pissa", "lora"):
        assert parse_config(valid(init__method=method, init__gamma=3)).gamma == 3.0


@pytest.mark.parametrize(("rslora", "scaling"), [(True, 12 / math.sqrt(9)), (False, 12 / 9)])
def test_scaling_divides_alpha_by_r_or_its_root(rslora, scaling, here):
    assert parse_config(valid(lora__r=9, lora__alpha=12, lora__use_rslora=rslora)).scaling == pytest.approx(scaling)


def test_scaling_of_adalora_is_that_of_peft_and_two_thirds_stay_unless_given(here):
    config = parse_config(valid(**ADALORA, lora__r=12, lora__alpha=32))
    assert config.scaling == 32 / 12.00001
    assert config.lora.target_r == 8
    assert config.preconditioner == ("none", None)


@pytest.mark.parametrize(("policy", "stage"), [({}, 0), ({"zero_optimization": {"stage": 3}}, 3)])
def test_zero_stage_is_the_jsons(policy, stage, here):
    assert parse_config(write(valid(), **policy)).deepspeed.stage == stage


def test_a_config_does_not_change_after_it_was_checked(here):
    config = parse_config(valid())
    with pytest.raises(ValueError, match="frozen"):
        config.lora.r = 0


# What is refused ------------------------------------------------------------------------------------------------------


def test_every_problem_of_every_group_in_one_error(here):
    raw = valid(
        model__path="nowhere/at/all",
        data__max_length=1,
        lora__r=0,
        init__method="lora",
        init__gamma=2,
        optim__lr=-1,
        optim__name="lion",
        train__epochs=1,
        deepspeed__config="gone.json",
    )
    Path("run.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="10 problems in the config") as caught:
        load_config("run.yaml", ["lora.x=1", "lora.dropout"])
    expected = [
        # value, rule and remedy of each
        ("override 'lora.dropout'", "must be key=value", "e.g. lora.r=16"),
        ("data.max_length = 1", "should be greater than or equal to 2", "Tokens per sample, at least 2"),
        ("lora.r = 0", "should be greater than or equal to 1", "at least 1 and at most min(out_features"),
        ("lora.x = 1", "no such setting", "Known here: r, alpha, dropout"),
        ("optim.name = 'lion'", "should be 'adamw' or 'sgd'", "adamw: decoupled weight decay"),
        ("optim.lr = -1", "should be greater than 0", "Peak learning rate, above 0"),
        ("model.path = nowhere/at/all", "neither a folder nor a hub name", "Give a folder, or org/model"),
        ("train.epochs = 1.0, train.max_steps = 10", "exactly one must be given"),
        ("deepspeed.config = gone.json", "cannot be read as JSON", "ds_configs/ holds working ones"),
        ("init.gamma = 2.0", "has no effect with init.method lora", "Leave it out"),
    ]
    for problem, (start, *parts) in zip(caught.value.problems, expected, strict=True):
        assert problem.startswith(start)
        assert [part for part in parts if part not in problem] == []
        assert f"\n  - {problem}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__alhpa": 4}, "lora.alhpa = 4: no such setting. Did you mean alpha?"),
        ({"optm": {"lr": 1}}, "optm = {'lr': 1}: no such setting. Did you mean optim?"),
        ({"data__trian": "x"}, "data.trian = 'x': no such setting. Did you mean train?"),
        ({"train__gradient_accumulation_steps": 2}, "no such setting. Known here: epochs, max_steps, micro_batch_size"),
        (
            {"zzz": 1},
            "zzz = 1: no such setting. Known here: model, data, lora, init, optim, train, deepspeed, comm, checkpoint",
        ),
    ],
)
def test_unknown_key_names_the_near_one_or_all(changes, message, here):
    (problem,) = problems(valid(**changes))
    assert message in problem


@pytest.mark.parametrize("key", ["model.path", "data.train", "output_dir"])
def test_required_key_is_asked_for(key, here):
    raw = valid()
    group, _, name = key.partition(".")
    del (raw[group] if name else raw)[name or group]
    (problem,) = problems(raw)
    assert problem.startswith(f"{key}: is required. F"), "with the field's own help"


BOUNDS = [
    # key, smallest or largest values that pass, values that do not
    ("data.max_length", [2], [1, 2.5, "many", None]),
    ("data.max_train_samples", [1, None], [0]),
    ("data.packing", [True, False], ["often", None]),
    ("data.eval_fraction", [1e-6, 0.999, None], [0, 1, -0.1, "half"]),
    ("data.max_eval_samples", [None], [0]),
    ("lora.r", [1], [0, -1]),
    ("lora.alpha", [1e-9], [0]),
    ("lora.dropout", [0, 0.999], [-0.1, 1]),
    ("lora.exclude_modules", [None, [], ["v_proj"], r".*\.0\..*"], ["(", 3, [3]]),
    (
        "lora.rank_pattern",
        [{}, {"v_proj": 1}, {r"layers\.[01]\..*": 3}],
        [{"v_proj": 0}, {"(": 2}, {"v": 1.5}, ["v"], {"+": 1}],
    ),
    ("lora.kind", ["dora"], ["vera"]),
    ("lora.alpha_pattern", [{}, {"v_proj": 1e-9}], [{"v_proj": 0}, {"(": 2}, {"v": "much"}]),
    ("init.num_samples", [1], [0]),
    ("init.gamma", [1e-9, None], [0, -1]),
    ("init.layer_groups", [1], [0]),
    ("init.svd_tolerance", [1e-12, 0.1], [0, 0.11]),
    ("optim.lr", [1e-12], [0, float("nan")]),
    ("optim.lr_ratio_b", [1e-3], [0]),
    ("optim.betas", [[0, 0]], [[0.9], [0.9, 0.9, 0.9], [0.9, 1.0], [-0.1, 0.9]]),
    ("optim.eps", [1e-30], [0]),
    ("optim.weight_decay", [0], [-1e-9]),
    ("optim.damping", [1e-30], [0]),
    ("optim.max_grad_norm", [0], [-1]),
    ("optim.warmup_steps", [0], [-1]),
    ("train.max_steps", [0], [-1]),
    ("train.micro_batch_size", [1, 32], [0]),
    ("train.global_batch_size", [1], [0]),
    ("train.log_steps", [1], [0]),
    ("train.eval_steps", [0], [-1]),
    ("train.exact_match_samples", [0], [-1]),
    ("train.seed", [0], [-1]),
    ("model.dtype", ["bf16", "fp32"], ["fp16"]),
    ("model.attn_implementation", ["auto", "eager", "flash_attention_2"], ["fast"]),
    ("model.recompute", ["auto", "all", "none", 0, 3], [True, -1, "some"]),
    ("model.checkpointing", ["reentrant"], [True, "none"]),
    ("model.memory_gb", ["auto", 0.5, 70], [0, "all", True]),
    ("data.format", ["chat"], ["alpaca"]),
    ("init.method", METHODS, ["olora"]),
    ("init.scheme", [], ["ArB2r"]),
    ("init.average", ["micro_batch"], ["sample"]),
    ("init.buffer", ["host"], ["disk"]),
    ("optim.preconditioner", ["none", "riemannian", "rescaled"], ["shampoo"]),
    ("optim.schedule", ["cosine", "constant"], ["wsd"]),
]


@pytest.mark.parametrize(("key", "good", "bad"), BOUNDS, ids=[key for key, _, _ in BOUNDS])
def test_range_of_a_field_is_closed_or_open_as_documented(key, good, bad, here):
    name = key.replace(".", "__")
    beside = {"optim__preconditioner": "rescaled"} if key == "optim.damping" else {}
    for value in good:
        assert problems(valid(**beside, **{name: value})) == [], value
    for value in bad:
        found = problems(valid(**beside, **{name: value}))
        assert len(found) == 1, (value, found)
        assert found[0].startswith(key)


def test_epochs_must_be_above_zero(here):
    (problem,) = problems(valid(train__max_steps=None, train__epochs=0))
    # the group is malformed, so that max_steps is not asked for on top
    assert problem.startswith("train.epochs = 0: should be greater than 0")


ALTERED_INIT = {
    "method": "lora",
    "scheme": "random",
    "stable_output": False,
    "num_samples": 4,
    "average": "micro_batch",
    "gamma": 2.0,
    "buffer": "host",
    "layer_groups": 2,
    "halves": True,
    "svd_tolerance": 0.01,
}
RULES = [
    # changes to a valid config, how the one problem starts, its rule or remedy
    (
        {"model__path": "empty"},
        "model.path = empty",
        "holds no config.json. Give the folder that save_pretrained wrote",
    ),
    ({"model__path": "train.jsonl"}, "model.path = train.jsonl", "is neither a folder nor a hub name"),
    ({"model__path": "llama"}, "model.path = llama", "Give a folder, or org/model"),
    ({"model__path": "org/model/main"}, "model.path = org/model/main", "is neither a folder nor a hub name"),
    ({"model__path": "org/mo del"}, "model.path = org/mo del", "is neither a folder nor a hub name"),
    ({"data__train": "gone.jsonl"}, "data.train = gone.jsonl", "no such file. Check the path"),
    ({"data__train": "empty/gone.parquet"}, "data.train = empty/gone.parquet", "no such file"),
    ({"data__train": []}, "data.train = []", "must name at least one file"),
    ({"data__train": ["train.jsonl", "gone"]}, "data.train = gone", "no such file"),
    ({"data__train": ["train.jsonl", "rows.txt"]}, "data.train = rows.txt", "must end in .jsonl or .json"),
    ({"data__train": "/a/b/rows.txt"}, "data.train = /a/b/rows.txt", "is no data set name. Files end in .jsonl"),
    ({"data__train": "org/a set"}, "data.train = org/a set", "is no data set name"),
    ({"data__eval": "gone.csv"}, "data.eval = gone.csv", "no such file"),
    ({"data__prompt": "{q}", "data__format": "chat"}, "data.prompt = '{q}'", "has no effect with data.format chat"),
    ({"data__completion": "{q}", "data__format": "text"}, "data.completion = '{q}'", "no effect with data.format text"),
    ({"data__messages": "turns"}, "data.messages = turns", "has no effect with data.format completion. Leave it out"),
    ({"data__text": "body", "data__format": "chat"}, "data.text = body", "has no effect with data.format chat"),
    ({"data__prompt": "{query"}, "data.prompt = '{query'", "is not a template (expected '}'"),
    ({"data__prompt": "Q: "}, "data.prompt = 'Q: '", "must name columns as {name}"),
    ({"data__prompt": "{{query}}"}, "data.prompt = '{{query}}'", "must name columns as {name}"),
    ({"data__completion": "{}"}, "data.completion = '{}'", "must name columns as {name}"),
    ({"data__completion": "{row[answer]}"}, "data.completion = '{row[answer]}'", "letters and digits only"),
    ({"data__format": "text", "data__loss_on": "all"}, "data.loss_on = all", "has no effect with data.format text"),
    *[
        (
            {"init__adapter": "adapter", f"init__{key}": value},
            f"init.{key} = {value}",
            "has no effect with init.adapter",
        )
        for key, value in ALTERED_INIT.items()
    ],
    ({"init__adapter": "empty"}, "init.adapter = empty", "holds no adapter_config.json. Give a PEFT folder"),
    *[
        (
            {"init__method": method, f"init__{key}": value},
            f"init.{key} = {value}",
            f"no effect with init.method {method}",
        )
        for method in ("pissa", "lora")
        for key, value in [("num_samples", 4), ("average", "micro_batch"), ("gamma", 2.0), ("halves", True)]
    ],
    *[
        (
            {"init__method": "lora", f"init__{key}": value},
            f"init.{key} = {value}",
            "has no effect with init.method lora",
        )
        for key, value in [("buffer", "host"), ("layer_groups", 2), ("svd_tolerance", 0.01)]
    ],
    ({"lora__kind": "lora_sb"}, "lora.kind = lora_sb", "Set init.method to lora_sb too"),
    ({"init__method": "lora_sb"}, "init.method = lora_sb", "Set lora.kind to lora_sb too"),
    (
        {"lora__kind": "lora_sb", "init__method": "lora_sb", "optim__preconditioner": "rescaled"},
        "optim.preconditioner = rescaled",
        "has no effect with lora.kind lora_sb",
    ),
    (
        {"lora__kind": "lora_sb", "init__method": "lora_sb", "optim__lr_ratio_b": 16},
        "optim.lr_ratio_b = 16",
        "has no effect with lora.kind lora_sb",
    ),
    (
        {"lora__kind": "dora", "optim__preconditioner": "lora_pro"},
        "optim.preconditioner = lora_pro",
        "is for lora.kind lora",
    ),
    *[
        ({f"init__{key}": value}, f"init.{key} = {value}", "has no effect with init.method lora_one. Leave it out")
        for key, value in [("scheme", "random"), ("stable_output", False)]
    ],
    *[
        (
            {"init__method": "lora_ga", "init__scheme": "random", f"init__{key}": value},
            f"init.{key} = {value}",
            "has no effect with init.scheme random. Leave it out",
        )
        for key, value in ALTERED_INIT.items()
        if key not in ("method", "scheme", "stable_output", "gamma")
    ],
    (
        {"init__method": "lora_ga", "init__stable_output": False, "init__gamma": 2.0},
        "init.gamma = 2.0",
        "has no effect with init.stable_output False. Leave it out",
    ),
    (
        {"optim__betas": [0.9, 1.0]},
        "optim.betas = 1.0",
        "should be less than 1. AdamW's moment decays, each in [0, 1).",
    ),
    (
        {"optim__damping": 0.1},
        "optim.damping = 0.1",
        "needs optim.preconditioner beside it",
    ),
    (
        {"optim__preconditioner": "none", "optim__damping": 1.0},
        "optim.damping = 1.0",
        "has no effect with optim.preconditioner none. Leave it out",
    ),
    ({"optim__name": "sgd", "optim__betas": [0.8, 0.9]}, "optim.betas = (0.8, 0.9)", "no effect with optim.name sgd"),
    (
        {"optim__name": "sgd", "optim__eps": 1e-6},
        "optim.eps = 1e-06",
        "has no effect with optim.name sgd. Leave it out",
    ),
    ({"train__max_steps": None}, "train.epochs = None, train.max_steps = None", "exactly one must be given"),
    ({"train__epochs": 2}, "train.epochs = 2.0, train.max_steps = 10", "exactly one must be given"),
    (
        {"train__micro_batch_size": 8, "train__global_batch_size": 7},
        "train.global_batch_size = 7",
        "must be at least train.micro_batch_size = 8. Raise it or lower micro_batch_size",
    ),
    (
        {"train__exact_match_pattern": "x"},
        "train.exact_match_pattern",
        "has no effect with train.exact_match_samples 0",
    ),
    (
        {"train__exact_match_max_new_tokens": 8},
        "train.exact_match_max_new_tokens",
        "no effect with train.exact_match_s",
    ),
    (
        {"train__exact_match_samples": 4, "data__eval": "eval.jsonl", "train__exact_match_pattern": "(x"},
        "train.exact_match_pattern = '(x'",
        "is no regular expression (missing )",
    ),
    # rules over two groups
    *[
        (
            {**ADALORA, **changes},
            "lora.kind = adalora",
            "divides alpha by r. Set init.method to lora and lora.use_rslora to false, and leave init.adapter out",
        )
        for changes in ({"init__method": "pissa"}, {"lora__use_rslora": True})
    ],
    ({**ADALORA, "lora__adalora_target_r": 8}, "lora.adalora_target_r = 8", "must be below lora.r = 8. Lower it or"),
    ({**ADALORA, "lora__r": 1}, "lora.adalora_target_r = 1", "must be below lora.r = 1"),
    (
        {**ADALORA, "lora__adalora_warmup_steps": 4, "lora__adalora_final_steps": 6},
        "lora.adalora_warmup_steps = 4, lora.adalora_final_steps = 6",
        "must leave steps between them, train.max_steps is 10. Lower them",
    ),
    ({"lora__adalora_interval": 2}, "lora.adalora_interval = 2", "has no effect with lora.kind lora. Leave it out"),
    ({**ADALORA, "optim__preconditioner": "none"}, "optim.preconditioner = none", "no effect with lora.kind adalora"),
    *[
        (
            {"optim__warmup_steps": steps, "optim__schedule": schedule},
            f"optim.warmup_steps = {steps}",
            "must be below train.max_steps = 10. Lower it",
        )
        for steps, schedule in ((10, "linear"), (11, "cosine"), (10, "constant"))
    ],
    (
        {"train__exact_match_samples": 4},
        "train.exact_match_samples = 4",
        "needs data.eval or data.eval_fraction, and data.format completion",
    ),
    (
        {"train__exact_match_samples": 4, "data__eval": "eval.jsonl", "data__format": "chat"},
        "train.exact_match_samples = 4",
        "Give both, or set it to 0",
    ),
    (
        {"train__exact_match_samples": 4, "data__eval_fraction": 0.5, "data__format": "chat"},
        "train.exact_match_samples = 4",
        "Give both, or set it to 0",
    ),
    (
        {"train__eval_steps": 5},
        "train.eval_steps = 5",
        "needs data.eval or data.eval_fraction. Give one, or set eval_steps to 0",
    ),
    (
        {"data__eval": "eval.jsonl", "data__eval_fraction": 0.25},
        "data.eval = eval.jsonl, data.eval_fraction = 0.25",
        "at most one may be given. Leave one out, or null",
    ),
    *[
        ({"data__eval_fraction": 0.25, f"data__{key}": value}, f"data.{key} = {value}", "has no data set to apply to")
        for key, value in [("eval_split", "validation"), ("max_eval_samples", 4)]
    ],
]


@pytest.mark.parametrize(("changes", "start", "rule"), RULES, ids=[f"{start}: {rule[:30]}" for _, start, rule in RULES])
def test_rule_over_fields_and_files(changes, start, rule, here):
    found = problems(valid(**changes))
    assert len(found) == 1, found
    assert found[0].startswith(start)
    assert rule in found[0]


def test_rules_over_two_groups_hold_while_a_third_is_malformed(here):
    found = problems(valid(lora__r=0, train__eval_steps=5))
    assert [problem.split(" = ")[0] for problem in found] == ["lora.r", "train.eval_steps"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r", "override 'lora.r': must be key=value with a dotted key, e.g. lora.r=16."),
        ("=3", "override '=3': must be key=value"),
        ("lora..r=3", "override 'lora..r=3': must be key=value"),
        ("lora.=3", "override 'lora.=3': must be key=value"),
        ("output_dir.x=1", "output_dir holds 'out', not a group. Check the key."),
        ("data.train.0=x", "train holds 'train.jsonl', not a group. Check the key."),
        ("lora.r=", "override 'lora.r=': has no value. Give one, or null for the default."),
        ("lora.rnk=null", "lora.rnk = None: no such setting. Known here: r, alpha"),
        ("model.path=null", "model.path: is required."),
        ("lora.rank=4", "lora.rank = 4: no such setting"),
        ("foo.bar=1", "foo = {'bar': 1}: no such setting"),
    ],
)
def test_bad_override_is_named(override, message, here):
    Path("run.yaml").write_text(yaml.safe_dump(valid()))
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", [override])
    (problem,) = caught.value.problems
    assert message in problem


def test_override_that_is_no_yaml_is_refused_next_to_the_others(here):
    Path("run.yaml").write_text(yaml.safe_dump(valid()))
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", ["lora.target_modules=[q_proj", "lora.r=0"])
    assert len(caught.value.problems) == 2
    assert "expected ',' or ']'" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as YAML: [Errno 2]"),
        (b"\xff\xfe\xfa", "cannot be read as YAML: 'utf-8' codec"),
        (b"model: {path: a", "cannot be read as YAML"),
        (b"", "holds NoneType, must hold groups such as 'model:'"),
        (b"[1, 2]", "holds list, must hold groups"),
    ],
)
def test_yaml_that_is_missing_or_broken_is_named(content, message, here):
    if content is not None:
        Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    (problem,) = caught.value.problems
    assert problem.startswith("--config run.yaml: ")
    assert message in problem


# The ZeRO JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
        "torch_autocast",
        "optimizer",
        "scheduler",
        "zero_allow_untested_optimizer",
    ],
)
def test_what_the_run_sets_is_refused_in_the_zero_json(key, here):
    (problem,) = problems(write(valid(), **{key: "auto", "zero_optimization": {"stage": 3}}))
    assert (
        problem == f"deepspeed.config = policy.json: sets {key!r}, which the run's YAML sets. Take it out of the JSON."
    )


@pytest.mark.parametrize(
    ("zero", "rule"),
    [
        ({"stage": 1}, "zero_optimization.stage = 1, must be 0 or 3. A frozen base has no gradients"),
        ({"stage": 2}, "zero_optimization.stage = 2, must be 0 or 3"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer has no effect"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_optimization.zero_hpz_partition_size has no effect"),
        ({"stage": 3, "mics_shard_size": 8}, "zero_optimization.mics_shard_size has no effect"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights has no effect"),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_optimization.zero_quantized_gradients has no effect"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "nontrainable_weights has no effect"),
        ({"stage": 3, "stage3_prefetch_bucket": 1}, "stage3_prefetch_bucket has no effect"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.device = nvme, must be none or cpu"),
        ({"stage": 0, "offload_param": {"device": "cpu"}}, "offload_param has no effect on a frozen base at stage 0"),
        ({"offload_param": {"device": "cpu"}}, "offload_param has no effect on a frozen base at stage 0"),
    ],
)
def test_zero_option_that_cannot_work_is_refused(zero, rule, here):
    (problem,) = problems(write(valid(), zero_optimization=zero))
    assert problem.startswith("deepspeed.config = policy.json: ")
    assert rule in problem


def test_base_can_be_sharded_inside_each_host_at_stage_3_alone(here):
    found = []
    for stage in (3, 0):
        raw = write(valid(), zero_optimization={"stage": stage})
        raw["deepspeed"]["shard_group"] = "node"
        found += problems(raw)
    assert found == [
        "deepspeed.shard_group = node: has no effect at stage 0, where every rank holds the base. Leave it out, or "
        "give a stage 3 JSON."
    ]


def test_zero_options_that_act_are_accepted(here):
    assert problems(write(valid(), zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}})) == []
    assert problems(write(valid(), zero_optimization={"stage": 3, "stage3_max_live_parameters": 10})) == []


@pytest.mark.parametrize("key", ["steps_per_print", "gradient_cliping", "activation_checkpointing"])
def test_other_keys_of_the_zero_json_are_refused(key, here):
    (problem,) = problems(write(valid(), zero_optimization={"stage": 3}, **{key: 1}))
    assert f"'{key}' has no effect here or is not supported" in problem


def test_settings_without_their_data_are_refused(here):
    (problem,) = problems(valid(data__train="train.jsonl", data__train_split="train[:5]"))
    assert problem.startswith("data.train_split = train[:5]: has no data set to apply to")
    without = valid(data__train="train.jsonl", data__max_eval_samples=4)
    without["data"].pop("eval", None)
    (problem,) = problems(without)
    assert problem.startswith("data.max_eval_samples = 4: has no data set to apply to")


def test_flash_attention_needs_bf16(here):
    (problem,) = problems(valid(model__dtype="fp32", model__attn_implementation="flash_attention_2"))
    assert "needs dtype bf16" in problem


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_zero_json_that_is_missing_or_broken_is_named(content, here):
    if content is not None:
        Path("policy.json").write_bytes(content)
    (problem,) = problems(valid(deepspeed={"config": "policy.json"}))
    assert problem.startswith("deepspeed.config = policy.json: cannot be read as JSON: ")
    assert problem.endswith("ds_configs/ holds working ones.")


# What we ship ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_loads(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    files = {key: str(raw["data"].get(key)) for key in ("train", "eval")}
    to_prepare = [f"data.{key} = {name}: no such file." for key, name in files.items() if name.startswith("data/")]
    assert [found for found in problems(raw) if not found.startswith(tuple(to_prepare))] == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_zero_json_is_accepted_here_and_by_deepspeed(path, here):
    from lora_one_dist.base import sharding

    config = parse_config(valid(deepspeed__config=str(path)))
    assert config.deepspeed.stage == (0 if path.stem == "stage0" else 3)
    resolved = sharding.deepspeed_config(config.deepspeed.policy(), "bf16", 2)
    # forbids what it does not know, so that a misspelt key is found
    accepted = sharding.deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**resolved["zero_optimization"])
    assert accepted.stage == config.deepspeed.stage
    assert (accepted.offload_param is not None) == ("offload" in path.stem)
    assert (resolved["bf16"], resolved["train_micro_batch_size_per_gpu"]) == ({"enabled": True}, 2)


def test_every_setting_is_explained():
    missing = [
        f"{group}.{name}"
        for group, field in Config.model_fields.items()
        for name, inner in getattr(field.annotation, "model_fields", {}).items()
        if not (inner.description or "").strip()
    ]
    assert missing == [], "the field's docstring is the remedy in an error message"


@pytest.mark.parametrize("policy", ["[]", '{"zero_optimization": null}', '{"zero_optimization": true}'])
def test_zero_json_of_another_shape_is_named(policy, here):
    Path("policy.json").write_text(policy)
    (problem,) = problems(valid(deepspeed={"config": "policy.json"}))
    assert "must be objects" in problem


def test_zero_values_of_another_type_are_named(here):
    (problem,) = problems(write(valid(), zero_optimization={"stage": 3, "offload_param": "cpu"}))
    assert "must be objects" in problem
    (problem,) = problems(write(valid(), zero_optimization={"stage": "3"}))
    assert "stage = '3', must be 0 or 3" in problem
    (problem,) = problems(write(valid(), zero_optimization={"stage": 3}, bfloat16={"enabled": True}))
    assert "sets 'bfloat16'" in problem


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"data__train": 5}, "data.train = 5: "),
        ({"lora__target_modules": [1]}, "lora.target_modules = "),
        ({"lora__target_modules": "q_proj"}, "lora.target_modules = 'q_proj': "),
        ({"lora": None}, "lora = None: "),
        ({"optim__lr": float("inf")}, "optim.lr = inf: "),
        ({"model__path": "../gone"}, "model.path = ../gone: is neither"),
        ({"model__path": "./gone"}, "model.path = ./gone: is neither"),
        ({"train": {1: 2, "max_steps": 3}}, "train.1 = 1: "),
        ({"train__exact_match_pattern": "x"}, "train.exact_match_pattern = x: has no effect"),
    ],
    ids=str,
)
def test_key_of_a_problem_is_the_users(changes, start, here):
    found = problems(valid(**changes))
    assert found
    assert all(problem.startswith(start) for problem in found), found
    assert all(problem.endswith(".") or problem.endswith("].") for problem in found), found
    assert not any("list[str]" in problem or "literal[" in problem for problem in found)


def test_override_that_is_no_yaml_is_named(here):
    Path("run.yaml").write_text(yaml.safe_dump(valid()))
    with pytest.raises(ConfigError, match=r"override 'lora.target_modules=\[q_proj': its value is no YAML"):
        load_config("run.yaml", ["lora.target_modules=[q_proj"])


def test_a_key_given_twice_is_refused(here):
    Path("run.yaml").write_text(yaml.safe_dump(valid()) + "lora:\n  r: 4\n  r: 8\n")
    with pytest.raises(ConfigError, match="'r' is given twice"):
        load_config("run.yaml")
