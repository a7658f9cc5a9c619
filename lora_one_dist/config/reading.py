"""From a YAML file and overrides (``lora.r=16``) to a checked :class:`Config`.

Runs on every rank before a model is touched.  Every problem is found before any is reported, in one
:class:`ConfigError`, each as value, rule and remedy.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_one_dist.config.checks import cross_checks
from lora_one_dist.config.effect import idle, rivals, shown, value_of
from lora_one_dist.config.paths import PathError, expanded
from lora_one_dist.config.settings import Config

RENAMED = {  # settings of before, and what to write instead
    "model.gradient_checkpointing": "is now model.recompute (auto, all, none or a number of blocks) and "
    "model.checkpointing (reentrant or non_reentrant). For none write recompute: none; else leave it out, or write "
    "recompute: all.",
}


class ConfigError(ValueError):
    """Every problem of a config: ``problems`` is a list of 'key = value: rule. remedy.' strings."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        plural = "problem" if len(self.problems) == 1 else "problems"
        super().__init__(f"{len(self.problems)} {plural} in the config:\n" + "\n".join(f"  - {p}" for p in problems))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings give each key once: plain YAML keeps the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = lambda note: None
) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides (values are YAML), check everything.  Not collective.

    Args, Raises: as :func:`parse_config`.
    """
    try:
        raw = yaml.load(Path(expanded(str(path))).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except PathError as error:
        raise ConfigError([f"--config {path}: {error}"]) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"--config {path}: cannot be read as YAML: {error}. Give a YAML file."]) from error
    if not isinstance(raw, dict):
        value = f"--config {path}: holds {type(raw).__name__}"
        raise ConfigError([f"{value}, must hold groups such as 'model:'. Give the YAML of a run."])
    return parse_config(raw, overrides, say)


def parse_config(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), say: Callable[[str], None] = lambda note: None
) -> Config:
    """Check a mapping of groups, after ``key.sub=value`` overrides; ``key=null`` stands for the default.

    An override wins: what it leaves without effect in ``raw`` is dropped.  Groups that are well-formed are checked
    against each other even if others are not.

    Args:
        say: told what was dropped and why.

    Raises:
        ConfigError: with every problem found.
    """
    settings, found, overridden = copy.deepcopy(dict(raw)), [], set()
    for override in overrides:
        try:
            overridden.add(_apply_override(settings, override))
        except ValueError as error:
            found.append(str(error))
    config, problems, groups = _validated(settings)
    while overridden and (dropped := _drop_one(settings, groups, overridden)) is not None:
        key, note = dropped
        overridden.add(key)  # and what stood with it alone goes too
        say(note)
        config, problems, groups = _validated(settings)
    found += problems + cross_checks(groups)
    if found or config is None:
        raise ConfigError(found)
    return config


def _validated(settings: Mapping[str, Any]) -> tuple[Config | None, list[str], dict[str, Any]]:
    """The config, or None and what is wrong with single settings; and its groups, as far as they are well-formed."""
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        return None, list(_described(error.errors())), _valid_groups(settings)
    return config, [], {name: getattr(config, name) for name in Config.model_fields}


def _drop_one(settings: dict[str, Any], groups: Mapping[str, Any], overridden: Set[str]) -> tuple[str, str] | None:
    """Take out a setting of the YAML that the command line has left without effect.  Returns it and what to say."""
    for key, effect, _ in idle(groups):
        set_by = [other for other in effect.keys if other in overridden]
        if set_by and key not in overridden:
            return _drop(settings, groups, key, set_by[0])
    for pair in rivals(groups):
        for key, other in (pair, pair[::-1]):
            stays = other == "train.max_steps" and groups["train"].max_steps == 0  # whatever epochs says
            if other in overridden and key not in overridden and not stays:
                return _drop(settings, groups, key, other)
    return None


def _drop(settings: dict[str, Any], groups: Mapping[str, Any], key: str, because: str) -> tuple[str, str]:
    group, _, name = key.partition(".")
    del settings[group][name]
    given, stands = shown(value_of(groups, key)), shown(value_of(groups, because))
    return (
        key,
        f"note: {key} = {given} is left out: without effect with {because} = {stands}, as the command line has it",
    )


def _apply_override(raw: dict[str, Any], override: str) -> str:
    """Set one value.  Returns its dotted key."""
    key, separator, value = override.partition("=")
    parts = key.lstrip("-").split(".")
    if not separator or not all(parts):
        raise ValueError(f"override {override!r}: must be key=value with a dotted key, e.g. lora.r=16.")
    if not value.strip():
        raise ValueError(f"override {override!r}: has no value. Give one, or null for the default.")
    node = raw
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {part} holds {child!r}, not a group. Check the key.")
        node = child
    try:
        parsed = yaml.safe_load(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"override {override!r}: its value is no YAML: {what}. Quote it: {parts[-1]}='...'."
        ) from error
    if parsed is None and _known_keys(parts[:-1]).count(parts[-1]):  # an unknown key stays, to be refused
        node.pop(parts[-1], None)
    else:
        node[parts[-1]] = parsed
    return ".".join(parts)


def _described(errors: Sequence[Any]) -> Iterator[str]:
    """A text for each setting that is wrong; what it may be of several kinds is joined by 'or'."""
    by_setting: dict[tuple[str, ...], list[Any]] = {}
    for error in errors:
        by_setting.setdefault(tuple(_setting_of(error)[0]), []).append(error)
    for alike in by_setting.values():
        rules = dict.fromkeys(error["msg"].removeprefix("Input should ") for error in alike)
        rule = alike[0]["msg"] if len(alike) == 1 else f"Input should {' or '.join(rules)}"
        yield _describe({**alike[0], "msg": rule})


def _setting_of(error: Any) -> tuple[list[str], Any]:
    """The path of what a pydantic error is about, and the field there, if there is one."""
    path: list[str] = []
    fields: Mapping[str, Any] = Config.model_fields
    field = None
    for part in map(str, error["loc"]):
        if field is not None and not fields:
            break  # below a setting: an item of a list, or what pydantic calls a member of a union
        path.append(part)
        if part not in fields:
            break
        field = fields[part]
        fields = getattr(field.annotation, "model_fields", {})
    return path, field


def _describe(error: Any) -> str:
    """One pydantic error as 'key = value: rule. remedy.'"""
    path, field = _setting_of(error)
    key = ".".join(path)
    help_text = " ".join((field.description or "").split()) if field is not None else ""
    if error["type"] == "extra_forbidden" and key in RENAMED:
        return f"{key} = {error['input']!r}: {RENAMED[key]}"
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
        return f"{key} = {error['input']!r}: no such setting. {remedy}"
    if error["type"] == "missing" and len(error["loc"]) == len(path):  # else an item of a pair
        return f"{key}: is required. {help_text or _give(path)}"
    if error["type"] == "path":  # holds its remedy
        return f"{key} = {error['input']!r}: {error['msg']}"
    return f"{key} = {error['input']!r}: {error['msg'].replace('Input should', 'should')}. {help_text or _give(path)}"


def _give(path: Sequence[str]) -> str:
    return f"Give a group of settings: {', '.join(_known_keys(path[:1]))}." if len(path) == 1 else "Check the key."


def _known_keys(path: Sequence[str]) -> list[str]:
    fields: Mapping[str, Any] = Config.model_fields
    for part in path:
        fields = getattr(fields[part].annotation, "model_fields", {}) if part in fields else {}
    return list(fields)


def _valid_groups(raw: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        group = field.annotation
        if not (isinstance(group, type) and issubclass(group, BaseModel)):
            continue
        try:
            groups[name] = group.model_validate(raw.get(name, {}))
        except ValidationError:
            continue  # already in the list that the whole config gave
    return groups
