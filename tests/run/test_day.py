"""A run keeps the day on which it began, whatever the clock and the cache say when it goes on."""

from __future__ import annotations

import datetime
import json

import pytest

from tests import models
from tests.ranks import run_ranks, write_json_lines
from tests.runs import metrics, settings, train

FIRST, NEXT = datetime.date(2026, 1, 31), datetime.date(2026, 2, 1)
TEMPLATE = (
    "{{ 'w41' if strftime_now('%d') == '31' else 'w42' }}"
    "{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def on_a_day(raw: dict, day: datetime.date, cache: str) -> str:
    """Runs on a rank: a run by a clock and a cache; what it was refused for."""
    import datasets

    from lora_one_dist.run import day as clock

    datasets.config.HF_DATASETS_CACHE, clock.today = cache, lambda: day
    try:
        train(raw)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def losses(out):
    return [line["loss"] for line in metrics(out) if "loss" in line]


@pytest.mark.full
def test_a_run_that_goes_on_after_midnight_with_another_cache_is_the_same(tmp_path):
    folder = tmp_path / "base"
    models.llama(layers=2).save_pretrained(folder)
    tokenizer = models.tokenizer("llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in models.rows(40)
    ]
    write_json_lines(tmp_path / "chats.jsonl", chats)

    def run(out: str, steps: int, day: datetime.date, cache: str, **more) -> str:
        raw = settings(
            folder,
            tmp_path / out / "run",
            train__max_steps=steps,
            data__format="chat",
            optim__schedule="constant",
            **more,
        )
        raw["data"] |= {"train": str(tmp_path / "chats.jsonl"), "eval": None}
        return run_ranks(2, on_a_day, raw, day, str(tmp_path / cache))[0]

    assert run("whole", 4, FIRST, "a") == ""
    assert run("parts", 2, FIRST, "a") == ""
    assert run("parts", 4, NEXT, "b") == ""
    assert losses(tmp_path / "parts" / "run") == losses(tmp_path / "whole" / "run")
    # The day is in the text: told another one, the run has other data.
    assert "training data is another one" in run("parts", 6, NEXT, "b", data__date="2026-02-01")
    held = json.loads((tmp_path / "parts" / "run" / "run.json").read_text())
    assert held["identity"]["config"]["data"]["date"] == "2026-01-31"
