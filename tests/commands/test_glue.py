"""GLUE as LoRA-GA trained on it: rows of words, and how answers to them are scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_one_dist.train import evaluate
from tests import tool

FIXTURES = Path("tests/fixtures/recipes/glue")


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
