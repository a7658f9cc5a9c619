"""``~`` and ``$NAME`` in every setting that is a path, and in arguments that no shell expands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lora_one_dist.config.paths import PathError, argument, expanded
from lora_one_dist.config.reading import ConfigError, load_config, parse_config
from lora_one_dist.config.settings import AsPath, Config

PATHS = ("model.path", "data.train", "data.eval", "init.adapter", "deepspeed.config", "resume", "output_dir")
OTHER_TEXT = {  # settings of free text that are no paths
    *(
        "data.train_split",
        "data.eval_split",
        "data.prompt",
        "data.completion",
        "data.messages",
        "data.tools",
        "data.text",
    ),
    *("lora.target_modules", "lora.exclude_modules", "lora.rank_pattern", "lora.alpha_pattern"),
    *("lora.new_tokens", "lora.modules_to_save"),
    "train.exact_match_pattern",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with everything that a config may name, and another folder to launch from."""
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {
        "base/config.json": "{}",
        "a.jsonl": "{}\n",
        "adapter/adapter_config.json": "{}",
        "step-1/manifest.json": "",
    }
    for name, content in (files | {"z.json": '{"zero_optimization": {"stage": 0}}'}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def raw() -> dict[str, Any]:
    return {
        "model": {"path": "~/base"},
        "data": {"train": ["~/a.jsonl", "~/a.jsonl"], "eval": "~/a.jsonl"},
        "init": {"adapter": "~/adapter"},
        "train": {"max_steps": 1},
        "deepspeed": {"config": "~/z.json"},
        "resume": "~/step-1",
        "output_dir": "~/runs/mine",
    }


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_a_home_is_expanded_in_every_path(home):
    config = parse_config(raw())
    for key in PATHS:
        value = value_at(config, key)
        for path in value if isinstance(value, list) else [value]:
            assert Path(path).is_relative_to(home), key
    assert parse_config(raw(), ["output_dir=~/other"]).output_dir == f"{home}/other"
    assert parse_config(raw(), ["data.train=[~/a.jsonl]"]).data.train == [f"{home}/a.jsonl"]
    assert f"output_dir: {home}/runs/mine\n" in config.to_yaml()


def test_every_setting_of_free_text_is_a_path_or_known_to_be_none():
    found = set()
    for name, field in Config.model_fields.items():
        is_group = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        inner = {f"{name}.{key}": f for key, f in field.annotation.model_fields.items()} if is_group else {name: field}
        for key, setting in inner.items():
            if "str" in str(setting.annotation).replace("strict", ""):
                found.add(key)
                assert (AsPath in setting.metadata) == (key in PATHS), key
    assert found == {*PATHS, *OTHER_TEXT}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["$SCRATCH/x", "/data/${USER}/x.jsonl"])
def test_a_variable_is_refused_with_value_rule_and_remedy(key, path, home):
    variable = "$SCRATCH" if "SCRATCH" in path else "${USER}"
    given = [f"{key}=[{path!r}]"] if key == "data.train" else [f"{key}={path}"]
    with pytest.raises(ConfigError) as caught:
        parse_config(raw(), given)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key} = ")
    assert f"'{path}'" in problem
    assert f": holds {variable}, and only a shell knows such variables. Write its value out, or give" in problem


@pytest.mark.parametrize("path", ["org/name", "a/~/b", "price$", "a$1", "x.jsonl", "C~1", "./~x"])
def test_other_names_stay_as_they_are(path):
    assert expanded(path) == path


def test_a_home_that_is_not_here_is_refused(home):
    with pytest.raises(
        PathError, match=r"^~nobody-here has no home here\. Write the path out; .* write \./~nobody-here\."
    ):
        expanded("~nobody-here/x")
    with pytest.raises(ConfigError, match=r"- output_dir = '~nobody-here/x': ~nobody-here has no home here"):
        parse_config(raw(), ["output_dir=~nobody-here/x"])


def test_the_configs_own_path_and_arguments(home):
    (home / "run.yaml").write_text("model: {path: ~/base}\n")
    with pytest.raises(ConfigError, match="data: is required"):  # so it was read
        load_config("~/run.yaml")
    with pytest.raises(ConfigError, match=r"--config \$HOME/run.yaml: holds \$HOME, and only a shell"):
        load_config("$HOME/run.yaml")
    assert argument("~/out") == home / "out"
    with pytest.raises(argparse.ArgumentTypeError, match=r"^\$OUT: holds \$OUT, and only a shell knows"):
        argument("$OUT")
