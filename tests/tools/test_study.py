"""The study's data makers and its statistics, on a few sentences; the runs themselves are tools/study/study.py."""

from __future__ import annotations

import json
import random
import re

import pytest

from tools.study import base, corpus, report, study, tasks

MAN = r"""
.TH open 2
.SH DESCRIPTION
The
.BR open ()
system call opens the file specified by \fIpathname\fP and
returns a file descriptor, as all others do.
.PP
.\" a remark that nobody shall read, ever, in any page at all.
If the specified file does not exist, it may be created by
.BR open "" (2).
.EX
int fd = open("a", O_RDONLY);
.EE
"""
POD = """
=head1 NAME

The C<bless> function tells the thingy referenced by L<the reference|perlref> that it is now an object.

    my $code = "This is a line of code, and it looks like a sentence to some.";

"""
FORTUNES = """A computer is like an old god, with a lot of rules and no mercy.
\t\t-- Joseph Campbell
%
Short one.
%
Any program which runs right is obsolete, as everybody knows by now.
"""


def sentences(count: int, seed: int) -> list[str]:
    """Paragraphs that hold every gap word in some place."""
    rng, found = random.Random(seed), []
    nouns = ["disk", "file", "page", "shell", "process", "library", "signal", "socket"]
    for i in range(count):
        words = rng.sample(tasks.GAP_WORDS, len(tasks.GAP_WORDS))
        found.append(f"Case {i} " + " ".join(f"{word} {rng.choice(nouns)}" for word in words) + " ends.")
    return found


@pytest.fixture(scope="module")
def paragraphs() -> dict[str, list[str]]:
    return {name: sentences(300, seed) for seed, name in enumerate(tasks.LABELLED)}


def test_markup_goes_and_sentences_stay():
    assert list(corpus.prose(MAN, "man")) == [
        "The open() system call opens the file specified by pathname and returns a file descriptor, as all others do.",
        "If the specified file does not exist, it may be created by open(2).",
    ]
    assert list(corpus.prose(POD, "pod")) == [
        "The bless function tells the thingy referenced by perlref that it is now an object."
    ]
    assert list(corpus.prose(FORTUNES, "fortunes")) == [
        "A computer is like an old god, with a lot of rules and no mercy.",
        "Any program which runs right is obsolete, as everybody knows by now.",
    ]
    table = "Name    1 2 3 4 5 6 7 8 9 10\nOther   1 2 3 4 5 6 7 8 9 10 11."
    assert list(corpus.prose(table + "\n\n" + "These are enough words for a whole sentence.", "text")) == [
        "These are enough words for a whole sentence."
    ]


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SOURCES", (corpus.Source("none", "no-such-package-at-all", "*", "text"),))
    with pytest.raises(corpus.CorpusError, match="package no-such-package-at-all: apt-get"):
        corpus.fetch(tmp_path)


def test_parts_are_disjoint_and_of_the_size_that_is_said(paragraphs):
    texts = [text for own in paragraphs.values() for text in own]
    parts = {part: [t for own in tasks.of_part(paragraphs, part).values() for t in own] for part in ("base", "train")}
    parts["eval"] = [text for own in tasks.of_part(paragraphs, "eval").values() for text in own]
    assert sorted(text for own in parts.values() for text in own) == sorted(texts)
    shares = [len(own) / len(texts) for own in parts.values()]
    # Binomial: a share of 1800 has a standard deviation of at most 0.011, three of which are allowed.
    assert shares == pytest.approx([11 / 16, 4 / 16, 1 / 16], abs=0.033)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_are_a_function_of_text_and_seed(task, paragraphs, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        tasks.write(paragraphs, tmp_path / folder, 96, 32, seed)
    a, b, c = (
        [(tmp_path / folder / task / f"{part}.jsonl").read_text() for part in ("train", "eval")] for folder in "abc"
    )
    assert a == b
    assert a[0] != c[0]
    assert a[1] != c[1]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_train_and_eval_share_nothing_and_answers_are_balanced(task, paragraphs, tmp_path):
    tasks.write(paragraphs, tmp_path, 96, 32, seed=0)
    rows = {
        part: [json.loads(line) for line in (tmp_path / task / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "eval")
    }
    assert [len(own) for own in rows.values()] == [96, 32]
    prompts = [row["prompt"] for own in rows.values() for row in own]
    assert len(set(prompts)) == len(prompts)
    for own in rows.values():
        answers = [row["completion"] for row in own]
        if task == "words":
            assert len(set(answers)) > len(answers) / 2
            continue
        counts = [answers.count(answer) for answer in set(answers)]
        assert len(counts) == (len(tasks.GAP_WORDS if task == "gap" else tasks.LABELLED))
        assert max(counts) - min(counts) <= 1
    evaluated = [row["prompt"].split("\n")[0].removeprefix(tasks.GAP).strip() for row in rows["eval"]]
    held = " ".join(text for own in tasks.of_part(paragraphs, "eval").values() for text in own)
    assert all(start in held for start in evaluated), "of paragraphs that are for evaluation"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_pattern_finds_the_answer_and_the_prompt_does_not_hold_it(task, paragraphs):
    rows = tasks.TASKS[task].make(tasks.of_part(paragraphs, "train"), 48, random.Random(0), set())
    for row in rows:
        first, last = row["prompt"].split("\n")
        if task == "words":
            assert tasks.TASKS[task].pattern is None
            long = [word for word in re.sub(r"[^a-z ]", "", first.lower()).split() if len(word) >= tasks.LONG]
            assert row["completion"] == " " + ", ".join(f"{word} {len(word)}" for word in long)
            continue
        (answer,) = re.findall(tasks.FIRST_WORD, row["completion"])
        assert row["completion"] == f" {answer}"
        if task == "gap":
            after = first.removeprefix(f"{tasks.GAP} ")
            assert len(f"{last} {after}".split()) <= tasks.WORDS
            assert any(f"{last} {answer} {after}" in text for own in paragraphs.values() for text in own)
        else:
            assert len(first.split()) <= tasks.WORDS
            assert any(first in text for text in paragraphs[answer])


def test_a_repeated_prompt_is_left_out_and_too_little_text_is_an_error(monkeypatch):
    monkeypatch.setattr(tasks, "LABELLED", ("one",))
    twice = {"one": ["The same words stand here, always.", "The same words stand here, always.", "And others."]}
    rows = tasks.make_source(twice, 2, random.Random(0), set())
    assert {row["prompt"] for row in rows} == {
        "The same words stand here, always.\nSource:",
        "And others.\nSource:",
    }
    with pytest.raises(ValueError, match="too few passages"):
        tasks.make_source(twice, 3, random.Random(0), set())


def final(method: str, values: list[float]) -> dict:
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    exact = {"exact_match": -mean, "exact_match_spread": spread}
    return {"method": method, "eval_loss": mean, "eval_loss_spread": spread, **exact, "seeds": len(values)}


def test_a_gap_below_two_standard_errors_is_a_tie():
    rows = [
        final("LoRA-One", [1.0, 1.1, 1.2]),  # standard error of the mean 0.0577
        final("worse", [1.5, 1.6, 1.7]),
        final("better", [0.5, 0.6, 0.7]),
        final("near", [1.15, 1.25, 1.35]),
        final("once", [1.5]),
    ]
    found = {row["against"]: row for row in report.verdicts(rows, "LoRA-One", "eval_loss")}
    assert found == {row["against"]: row for row in report.verdicts(rows, "LoRA-One", "exact_match")}, "more is better"
    assert {name: row["verdict"] for name, row in found.items()} == {
        "worse": "wins",
        "better": "loses",
        "near": "tie",
        "once": "not decided: one seed",
    }
    assert found["worse"]["better by"] == pytest.approx(0.5)
    assert found["worse"]["standard error"] == pytest.approx((2 * 0.01 / 3) ** 0.5)


def fake_results(made: study.Study, task: str, points) -> None:
    """Run folders as if they were done: loss (lr - 3e-3)^2 in decades, a little more for each seed."""
    for point in points:
        lr, seed = point.labels["optim.lr"], point.labels["train.seed"]
        loss = 2 + abs(lr - 3e-3) * 10 + seed / 100
        point.folder.mkdir(parents=True, exist_ok=True)
        (point.folder / "config.yaml").write_text(point.config.to_yaml())
        after = {"eval_loss": loss, "exact_match": 1 / loss}
        summary = {"before": {"eval_loss": 9.0, "exact_match": 0.0}, "after": after, "phases": [{"seconds": 2.0}]}
        (point.folder / "summary.json").write_text(json.dumps(summary))
        lines = [{"step": step, "loss": loss + 10 * (step <= 2)} for step in range(1, 9)]
        (point.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def small(tmp_path, paragraphs, model_folder) -> study.Study:
    """A study of two methods whose runs are made up."""
    budget = study.Budget(base_steps=1, steps=24, rates=3, seeds=3, train_rows=48, eval_rows=16)
    out = tmp_path / "study"
    tasks.write(paragraphs, out / "data", 48, 16, 0)
    (out / f"base-{base.DEFAULT}").symlink_to(model_folder("llama"))
    for task in tasks.TASKS:
        study.write_config(out, task, budget)
    return study.Study(out, budget, ["full fine-tuning", "LoRA-One"], at_once=1)


def test_best_rates_go_on_to_other_seeds_and_edges_are_extended(small):
    points = small.sweep_points("gap")
    assert [point.labels["optim.lr"] for point in points] == [3e-4, 1e-3, 1e-3, 3e-3, 3e-3, 1e-2]
    assert small.best("gap", points) == {}
    fake_results(small, "gap", points)
    assert small.best("gap", points) == {"full fine-tuning": 3e-3, "LoRA-One": 3e-3}
    (extended,) = small.edge_points("gap")
    assert dict(extended.labels) == {"method": "full fine-tuning", "optim.lr": 1e-2, "train.seed": 0}
    assert extended.config.train.mode == "full"
    fake_results(small, "gap", [extended])
    others = small.seed_points("gap")
    assert [(p.labels["optim.lr"], p.labels["train.seed"]) for p in others] == [
        (3e-3, 1),
        (3e-3, 1),
        (3e-3, 2),
        (3e-3, 2),
    ]


def test_tables_give_mean_and_spread_and_name_what_is_missing(small, tmp_path):
    fake_results(small, "gap", small.sweep_points("gap"))
    fake_results(small, "gap", small.edge_points("gap"))
    fake_results(small, "gap", small.seed_points("gap")[:3])
    facts = {"packages": {"a": "1"}, "parameters": 5, "steps": 2, "tokens": 4, "seconds": 1, "threads": 1}
    report.write(small, {**facts, "held_out_loss": 4.0, "characters": 9}, tmp_path / "results")
    found = json.loads((tmp_path / "results" / "study.json").read_text())["tasks"]["gap"]
    full, one = found["final"]
    assert full["method"] == "full fine-tuning"
    assert (full["lr"], full["at_edge"], full["seeds"]) == (3e-3, False, 3)
    assert full["eval_loss"] == pytest.approx(2.01)
    assert full["eval_loss_spread"] == pytest.approx(0.01)
    assert one["seeds"] == 2
    assert (full["early_loss"], one["early_loss"]) == pytest.approx((12.01, 12.005)), "of the first quarter"
    assert found["missing"] == ["LoRA-One, lr 0.003, seed 2: missing"]
    text = (tmp_path / "results" / "tables.md").read_text()
    assert "LoRA-One, lr 0.003, seed 2: missing" in text
    assert "## Task source\n\nNo run is done." in text
    for name in ("rates-gap.png", "curves-gap.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_every_method_has_a_config_that_is_accepted(small):
    for task in tasks.TASKS:
        every = study.Study(small.out, study.BUDGETS["floor"], list(study.METHODS), 1)
        points = every.sweep_points(task)
        assert len(points) == 3 * len(study.METHODS)
        assert len({point.name for point in points}) == len(points)
        assert [point.config.optim.preconditioner for point in points[:11]].count("rescaled") == 3
