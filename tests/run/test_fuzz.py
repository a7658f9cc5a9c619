"""Whatever a user writes: the readers of configs and of JSONL give a result or their own error, nothing else.

The examples are drawn from a fixed seed. To draw others: FUZZ_EXAMPLES=5000 pytest tests/run/test_fuzz.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lora_one_dist.config.checks import ZERO_KEYS
from lora_one_dist.config.reading import ConfigError, load_config, parse_config
from lora_one_dist.config.settings import Config
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows, place_of, placing
from lora_one_dist.data.samples import tokenize
from tests.config import test_config
from tests.data import conftest, helpers

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
here, cache, tokenizer = test_config.here, conftest.cache, conftest.tokenizer


def fuzz(examples: int) -> Any:
    """So many examples, the same in each run; others, and as many as asked for, with FUZZ_EXAMPLES."""
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=ignored,
    )


# What may stand in YAML or JSON: numbers of any size, text with anything but lone surrogates, and nests of them.
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just(10**400))
keys = st.one_of(st.text(max_size=10), st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
KEYS = [
    *Config.model_fields,
    *(
        f"{group}.{name}"
        for group, field in Config.model_fields.items()
        for name in getattr(field.annotation, "model_fields", {})
    ),
]
# Values near to what is accepted, for configs that come further.
plausible = st.one_of(
    values,
    st.integers(-1, 64),
    st.floats(0, 1),
    st.sampled_from([
        *("bf16", "fp32", "lora", "pissa", "lora_ga", "sgd", "none", "chat", "text", "all", "node", "auto", "host"),
        *("base", "train.jsonl", "eval.csv", "adapter", "policy.json", ".", "", "org/name", "x" * 300, "{q} {a}", "(x"),
        *([0.9, 0.99], ["train.jsonl"], ["q_proj"], [], {}),
    ]),
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> dict[Any, Any]:
    """A valid config with some settings replaced, added or taken out."""
    raw: dict[Any, Any] = test_config.valid()
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=5)):
        group, _, name = key.partition(".")
        node = raw.setdefault(group, {}) if name else raw
        if not isinstance(node, dict):
            continue
        if draw(st.booleans()) and (name or group) in node:
            del node[name or group]
        else:
            node[name or group] = draw(plausible)
    if draw(st.integers(0, 9)) == 0:
        raw[draw(keys)] = draw(values)
    return raw


def outcome(kind: type[Exception], read: Callable[[], Any]) -> tuple[Any, Any]:
    """(what it returns, None) or (None, its error of this kind)."""
    try:
        return read(), None
    except kind as error:
        return None, error


def check(read: Callable[[], Config]) -> None:
    """A config that its own YAML gives back, or a ConfigError whose problems say something."""
    config, refused = outcome(ConfigError, read)
    event("refused" if refused else "read")
    if refused:
        assert refused.problems
        assert all(len(problem) > 10 and problem.rstrip()[-1] in ".?" for problem in refused.problems), str(refused)
    else:
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


@fuzz(200)
@given(raw=configs())
def test_settings_of_any_value(raw, here):
    check(lambda: parse_config(raw))


@fuzz(50)
@given(raw=st.dictionaries(keys, values, max_size=6))
def test_mappings_of_any_shape(raw, here):
    check(lambda: parse_config(raw))


override = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=20)),
    st.builds("{}={}".format, st.sampled_from(KEYS), plausible),
    st.builds("{}={}".format, st.lists(st.sampled_from(["model", "lora", "r", "path", "x", ""])).map(".".join), values),
)


@fuzz(100)
@given(overrides=st.lists(override, max_size=4))
def test_overrides_of_any_text(overrides, here):
    Path("run.yaml").write_text(yaml.safe_dump(test_config.valid()))
    check(lambda: load_config("run.yaml", overrides))


VALID_YAML = yaml.safe_dump(test_config.valid(lora__r=4, optim__betas=[0.9, 0.99])).encode()


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes replaced, taken out, put in or doubled."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        put = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"\n", b"{", b"]", b'"', b": ", b"&a ", b"*a", b"!!"]))
        )
        content = content[:start] + put + content[draw(st.sampled_from([start, stop])) :]
    return content


@fuzz(100)
@given(content=st.one_of(st.binary(max_size=100), spoiled(VALID_YAML)))
def test_yaml_of_any_bytes(content, here):
    Path("run.yaml").write_bytes(content)
    check(lambda: load_config("run.yaml"))


@st.composite
def policies(draw: st.DrawFn) -> Any:
    zero: Any = {"stage": 3}
    for key in draw(st.lists(st.sampled_from([*sorted(ZERO_KEYS[3]), "zzz"]), max_size=4)):
        zero[key] = draw(plausible)
    return draw(st.sampled_from([{"zero_optimization": zero}, zero, [zero], {"zero_optimization": [zero]}]))


@fuzz(100)
@given(
    content=st.one_of(st.binary(max_size=40), policies().map(lambda policy: json.dumps(policy, default=str).encode()))
)
def test_zero_json_of_any_content(content, here):
    Path("policy.json").write_bytes(content)
    check(lambda: parse_config(test_config.valid(deepspeed__config="policy.json")))


# JSONL ----------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.just("2020-01-02")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", None]), "content": json_values}
)
columns = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(st.text(max_size=8), json_values),
        "completion": st.one_of(st.text(max_size=8), json_values),
        "messages": st.one_of(st.lists(message, max_size=3), json_values),
        "text": st.one_of(st.text(max_size=8), json_values),
    },
)
lines = st.lists(
    st.one_of(
        columns.map(json.dumps), json_values.map(json.dumps), st.sampled_from(["", " ", "{}", "[]", "null", "{"])
    ),
    max_size=5,
).map(lambda rows: "\n".join(rows).encode())
# Rows of the same columns, most of them good.
turns = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=5)}), min_size=1, max_size=3
)
good = {
    "prompt": st.text(max_size=8),
    "completion": st.text(max_size=8),
    "messages": turns,
    "text": st.text(max_size=8),
}
likely = st.one_of(
    st.fixed_dictionaries(good), st.fixed_dictionaries(good | {"messages": st.lists(message, max_size=3)})
)
tables = st.lists(likely, min_size=1, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
VALID_JSONL = b'{"prompt": "q", "completion": "r"}\n' * 2 + b'{"prompt": "\xc3\xa9", "completion": "\\u00e9"}\n'


def read_all(path):
    with placing(path):
        rows = load_rows(path, "", None)
        rows.to_list()
    return rows


@fuzz(150)
@given(
    content=st.one_of(st.binary(max_size=60), lines, tables, tables.flatmap(spoiled), spoiled(VALID_JSONL)),
    form=st.sampled_from(["completion", "chat", "text"]),
)
def test_jsonl_of_any_bytes(content, form, tokenizer, tmp_path, cache):
    path = str(tmp_path / "rows.jsonl")
    Path(path).write_bytes(content)
    rows, refused = outcome(DataError, lambda: read_all(path))
    event("file refused" if refused else "file read")
    if refused:
        assert str(refused).startswith(path)
        return
    assert len(rows.to_list()) == len(rows) > 0
    assert all(place_of(path, row).startswith(f"{path}, ") for row in range(len(rows)))
    loss_on = "all" if form == "chat" else "completion"
    data, refused = outcome(
        DataError, lambda: tokenize(rows, tokenizer, helpers.config(format=form, loss_on=loss_on), path)
    )
    event("rows refused" if refused else "rows read")
    if refused:
        assert path in str(refused) or "none has a token to learn" in str(refused)
    else:
        assert data.rows.tolist() == sorted(set(data.rows.tolist()))
