"""GLUE as LoRA-GA trained on it: rows of words, and how answers to them are scored."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from lora_one_dist.config.reading import load_config
from lora_one_dist.data import batches
from lora_one_dist.train import evaluate
from tests import tool
from tests.commands.test_recipes import comment

FIXTURES = Path("tests/fixtures/recipes/glue")
RECIPE = Path("launch/configs/t5_base_mnli_lora_ga.yaml")


def prepared(name: str, source: object, out: Path) -> tuple[tool.Done, dict[str, list[dict]]]:
    done = tool.run("prepare_data", name, "--source", source, "--out", out, check=False)
    return done, {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in out.glob("*.jsonl")
    }


def test_labels_become_words_and_the_matched_split_is_held_out(tmp_path):
    done, rows = prepared("glue_mnli", FIXTURES, tmp_path / "m")
    prompt = "classify the semantic similarity of the text: A man plays a guitar.\nSomebody makes music.\nresult:"
    assert rows["train"][0] == {"prompt": prompt, "completion": " entailment"}
    assert [row["completion"] for row in rows["train"]] == [" entailment", " neutral", " contradiction"]
    assert [row["completion"] for row in rows["eval"]] == [" entailment", " contradiction"]
    assert "dropped 1: without a label" in done.stdout
    _, rows = prepared("glue_cola", FIXTURES / "cola", tmp_path / "c")
    assert rows["eval"][1] == {
        "prompt": "classify the grammaticality of the text: Ran the home boy.\nresult:",
        "completion": " unacceptable",
    }


ROWS = {"mnli": 392_702, "sst2": 67_349, "cola": 8_551, "qnli": 104_743, "mrpc": 3_668}  # to train on
WORDS = {
    "mnli": {"entailment", "neutral", "contradiction"},
    "sst2": {"negative", "positive"},
    "cola": {"unacceptable", "acceptable"},
    "qnli": {"entailment", "not_entailment"},
    "mrpc": {"different", "equivalent"},
}


@pytest.mark.parametrize("task", ROWS)
def test_each_task_of_the_table_has_its_commands_in_the_recipe(task, tmp_path):
    said = comment(RECIPE)
    (data,) = (shlex.split(line) for line in said["Data"] if f" glue_{task} " in line)
    launch = next(shlex.split(line) for line in said["Launch"] if task == "mnli" or f"_{task}_" in line)
    assert data[:2] == ["python", "tools/prepare_data.py"]
    assert launch[:4] == ["deepspeed", "launch/train.py", "--config", str(RECIPE)]
    made = data[data.index("--out") + 1]
    own = {f"data.{key}": yaml.safe_load(RECIPE.read_text())["data"][key] for key in ("train", "eval")}
    own |= dict(setting.split("=") for setting in launch[4:])
    assert (own["data.train"], own["data.eval"]) == (f"{made}/train.jsonl", f"{made}/eval.jsonl")
    _, rows = prepared(f"glue_{task}", FIXTURES, tmp_path / "out")
    own |= {f"data.{key}": str(tmp_path / f"out/{key}.jsonl") for key in ("train", "eval")}
    config = load_config(RECIPE, [f"{key}={value}" for key, value in own.items()])
    assert task in config.output_dir
    steps = batches.steps_per_epoch(ROWS[task], config.train.global_batch_size)
    assert config.optim.warmup_steps == math.ceil(0.03 * steps), "as transformers rounds it"
    assert {row["completion"].strip() for row in rows["train"]} == WORDS[task]
    assert {row["completion"].strip() for row in rows["eval"]} <= WORDS[task]


@pytest.mark.parametrize("form", ["to_parquet", "to_csv", "save_to_disk"])
def test_local_copies_of_any_form_give_the_same_rows(form, tmp_path):
    source, found = tmp_path / "source", datasets.DatasetDict()
    for path in (FIXTURES / "mnli").glob("*.jsonl"):
        rows = datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
        found[path.stem] = rows.cast_column(
            "label", datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        )
    if form == "save_to_disk":
        found.save_to_disk(source)
    else:
        source.mkdir()
        for name, rows in found.items():
            getattr(rows, form)(source / f"{name}-00000-of-00001.{form.removeprefix('to_')}")
    _, rows = prepared("glue_mnli", source, tmp_path / "out")
    assert rows == prepared("glue_mnli", FIXTURES, tmp_path / "plain")[1] != {}


@pytest.mark.parametrize(("label", "shown"), [("2", "2"), ('"yes"', "'yes'"), ("true", "True"), ("[1]", "[1]")])
def test_a_label_of_another_task_is_refused(label, shown, tmp_path):
    shutil.copytree(FIXTURES / "cola", tmp_path / "cola")
    (tmp_path / "cola/train.jsonl").write_text(f'{{"sentence": "It is.", "label": {label}}}\n')
    done, _ = prepared("glue_cola", tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert f"row 0 (the first is 0): label = {shown}, must be 0 to 1, or -1. Mend the row" in done.stderr


def naive(references: list[int], answers: list[int]) -> float:
    """The correlation of one-hot columns, summed over classes."""
    X, Y = (torch.nn.functional.one_hot(torch.tensor(x), 3).double() for x in (references, answers))
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return float((X * Y).sum() / ((X * X).sum() * (Y * Y).sum()).sqrt())


@pytest.mark.parametrize("others", [0, 0.2])
def test_matthews_is_the_correlation_of_answers_with_references(others):
    generator = torch.Generator().manual_seed(3)
    references = (torch.rand(200, generator=generator) < 0.3).long()
    answers = torch.where(torch.rand(200, generator=generator) < 0.8, references, 1 - references)
    answers[torch.rand(200, generator=generator) < others] = 2  # neither of the words
    counts = [torch.bincount(x, minlength=k).double() for x, k in ((references, 2), (answers, 3))]
    found = evaluate.scores(*counts, float((references == answers).sum()))
    assert found["exact_match"] == pytest.approx(float((references == answers).double().mean()))
    assert found["matthews"] == pytest.approx(naive(references.tolist(), answers.tolist()), abs=1e-12)
    if not others:
        both = torch.corrcoef(torch.stack([references, answers]).double())[0, 1]
        assert found["matthews"] == pytest.approx(float(both), abs=1e-12)


def test_one_answer_to_all_has_no_correlation():
    asked, answered = torch.tensor([3.0, 7.0]), torch.tensor([0.0, 10.0, 0.0])
    assert evaluate.scores(asked, answered, 7.0) == {"exact_match": 0.7, "matthews": 0.0}
    assert "matthews" not in evaluate.scores(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]), 3.0)
