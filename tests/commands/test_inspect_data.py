"""tools/inspect_data.py: what it marks is what carries a loss, and its totals are those of the run."""

from __future__ import annotations

import re
import sys

import pytest
import yaml

from lora_one_dist.commands import inspect_data
from lora_one_dist.config.reading import load_config
from lora_one_dist.data import batches
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.split import held_out, training_data
from lora_one_dist.data.tokenizer import load_tokenizer
from tests import models, tool
from tests.data.conftest import cache  # noqa: F401 (for the session)
from tests.ranks import write_json_lines


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's YAML over rows of repeated words, one without a target when cut, one with an escape sequence."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    models.tokenizer("llama").save_pretrained(tmp_path / "base")
    rows = [*models.rows(20), {"prompt": " ".join(["w9"] * 30), "completion": " w9"}]
    raw = {
        "model": {"path": str(tmp_path / "base"), "dtype": "fp32"},
        "data": {"train": str(write_json_lines(tmp_path / "train.jsonl", rows)), "max_length": 16},
        "train": {"max_steps": 2, "global_batch_size": 4, "seed": 3},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "run.yaml"


def tokens_of(run, *overrides):
    config = load_config(run, overrides)
    tokenizer = load_tokenizer(config.model.path, False)
    rows = load_rows(config.data.train, "", None)
    return training_data(rows, tokenizer, config.data), tokenizer


def expected(ids, labels, tokenizer):
    """The words of a document, those with a loss in [[...]], by token."""
    words = tokenizer.convert_ids_to_tokens(ids)
    text, inside = "", False
    for i, (word, label) in enumerate(zip(words, labels, strict=True)):
        is_target = i > 0 and label != -100
        text += "]]" * (inside and not is_target)
        text += " " * (i > 0)
        text += "[[" * (is_target and not inside) + word
        inside = is_target
    return text + "]]" * inside


def squeezed(text):
    """Without the spaces next to a bracket: which side of it they are on is the decoder's."""
    return re.sub(r" *(\[\[|\]\]) *", r" \1 ", text).strip()


def test_samples_of_the_first_step_with_their_targets(run):
    tokens, tokenizer = tokens_of(run)
    shown = tool.run("inspect_data", "--config", run, "--plain", "--samples", 4).stdout
    numbers = batches.global_batch(len(tokens), 4, 0, 3)
    heads = re.findall(r"--- sample (\d+): (.*), line (\d+), (\d+) tokens, (\d+) targets\n(.*)\n", shown)
    assert [int(head[0]) for head in heads] == numbers
    for number, (_, path, line, length, targets, text) in zip(numbers, heads, strict=True):
        sample = tokens.dataset[number]
        assert (path, int(line)) == (str(run.parent / "train.jsonl"), tokens.rows[number] + 1)
        assert (int(length), int(targets)) == (len(sample["input_ids"]), sample["num_targets"])
        assert squeezed(text) == squeezed(expected(sample["input_ids"], sample["labels"], tokenizer))


def test_totals(run):
    tokens, _ = tokens_of(run)
    lines = tool.run("inspect_data", "--config", run).stdout.splitlines()[-4:]
    assert lines[0] == "21 rows: 1 dropped without targets, 1 cut at 16 tokens, 20 samples"
    assert lines[1].startswith(f"{tokens.num_tokens} tokens, {tokens.num_targets} of them targets (")
    lengths = sorted(map(len, tokens.dataset["input_ids"]))
    assert lines[2].startswith(f"tokens a sample: {lengths[0]} at 0 %, ")
    assert lines[2].endswith(f", {lengths[-1]} at 100 %")
    a_step = f"{tokens.num_tokens / 5:.0f} tokens and {tokens.num_targets / 5:.0f} targets"
    assert lines[3] == f"5 steps an epoch, 4 samples each: {a_step} a step on average"


def test_documents_of_packed_rows_are_told_apart(run):
    setting = "data.packing=true"
    tokens, tokenizer = tokens_of(run, setting)
    done = tool.run("inspect_data", setting, "--config", run, "--plain", "--samples", len(tokens))
    for part in done.stdout.split("--- packed row ")[1:]:
        number = int(part.split(":")[0])
        sample = tokens.dataset[number]
        found = re.findall(r"document of row (\d+) \(the first is 0\), (\d+) tokens, \d+ targets\n(.*)\n", part)
        assert [int(row) for row, _, _ in found] == tokens.rows_of(number)
        assert [int(length) for _, length, _ in found] == sample["lengths"]
        start = 0
        for _, length, text in found:
            ids, labels = (
                list(map(int, sample[name][start : start + int(length)])) for name in ("input_ids", "labels")
            )
            assert squeezed(text) == squeezed(expected(ids, labels, tokenizer))
            start += int(length)
    fill = tokens.num_tokens / (16 * len(tokens))
    assert f"{len(tokens)} packed rows, {fill:.1%} full, {20 / len(tokens):.2f} documents a row\n" in done.stdout
    assert f"{-(-len(tokens) // 4)} steps an epoch, 4 packed rows each: " in done.stdout


def test_held_out_rows(run):
    done = tool.run("inspect_data", "--config", run, "--eval", "--samples", 100, "data.eval_fraction=0.2")
    _, held = held_out(21, 0.2)
    lines = [int(line) - 1 for line in re.findall(r"--- sample \d+: .*, line (\d+),", done.stdout)]
    assert lines == [row for row in held if row != 20]
    assert "steps an epoch" not in done.stdout
    done = tool.run("inspect_data", "--config", run, "--eval", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--eval: the config names no evaluation data. Give data.eval or data.eval_fraction." in done.stderr


def test_colours_only_on_a_terminal_that_wants_them(run, monkeypatch):
    printed: list[str] = []

    class Terminal:
        tty = True

        def write(self, text):
            printed.append(text)

        def flush(self):
            pass

        def isatty(self):
            return self.tty

    def shown(*arguments):
        printed.clear()
        assert inspect_data.main(["--config", str(run), "--samples", "1", *arguments]) == 0
        return "".join(printed)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    coloured = shown()
    assert "\033[32m" in coloured
    assert "\033[1;35m<s>" in coloured
    assert "[[" not in coloured
    assert "\033" not in shown("--plain")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown()
    assert "\033" not in plain
    assert "[[" in plain
    monkeypatch.delenv("NO_COLOR")
    terminal.tty = False
    assert shown() == plain
    assert inspect_data.printable("a\x1b[31m\n\tü\r") == "a\\x1b[31m\n\tü\\r"


def test_bad_configs_and_data_are_refused_as_by_the_run(run, tmp_path):
    done = tool.run("inspect_data", "--config", run, "data.max_length=1", "lora.x=2", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 problems in the config" in done.stderr
    done = tool.run("inspect_data", "--config", run, "data.prompt='{question}'", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "reads columns ['question']" in done.stderr
