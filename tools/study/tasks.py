"""Three fine-tuning tasks made of real paragraphs: which word is missing, where a passage comes from, its long words.

In: paragraphs by source.  Out: JSONL with prompt and completion, a function of text and seed alone.  A paragraph is for
the base or for the tasks' training or for their evaluation, by its hash: the three never share one.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

WORDS, BEFORE = 14, 9  # of a passage, about 24 tokens; of them before a gap
GAP_WORDS = ("of", "to", "in", "for", "with", "on", "by", "from", "at", "as", "that", "which", "if", "is", "are", "not")
GAP = "..."
LABELLED = ("debian", "vim", "perl", "calls", "library", "concepts")  # to tell apart; the last three are near
LISTED, LONG, FEWEST_LONG = 10, 6, 3  # words of a passage to list; letters of a long one; at least so many long ones
BASE_OF, TRAIN_OF = 11, 15  # of 16 paragraphs the first are for the base, the next for training, the last to evaluate
Row = dict[str, str]


def part_of(paragraph: str) -> str:
    """What a paragraph is for: base, train or eval.  Pure."""
    place = hashlib.sha256(paragraph.encode()).digest()[0] % 16
    return "base" if place < BASE_OF else "train" if place < TRAIN_OF else "eval"


def of_part(paragraphs: Mapping[str, Sequence[str]], part: str) -> dict[str, list[str]]:
    """The paragraphs by source that are for one thing."""
    return {name: [text for text in texts if part_of(text) == part] for name, texts in paragraphs.items()}


def make_gap(paragraphs: Mapping[str, Sequence[str]], count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """Passages with one of GAP_WORDS left out; each word is the answer of as many rows, give or take one.

    ``taken``: prompts that no row may have; those of the rows are added.
    """
    texts = [text for own in paragraphs.values() for text in own]
    rng.shuffle(texts)
    left, rows = dict.fromkeys(texts), []
    for place in range(count):
        answer = GAP_WORDS[place % len(GAP_WORDS)]
        rows.append(_take(left, partial(_gap_row, answer, rng), taken))
    rng.shuffle(rows)
    return rows


def _gap_row(answer: str, rng: random.Random, text: str) -> Row | None:
    """What follows the missing word, then what comes before it: a language model's own next word is a first guess."""
    words = text.split(" ")
    # Not the first word of the paragraph and not the last: there is something to read on both sides.
    places = [i for i in range(1, len(words) - 1) if words[i] == answer]
    if not places:
        return None
    at = rng.choice(places)
    before, after = words[max(0, at - BEFORE) : at], words[at + 1 : at + 1 + WORDS - BEFORE]
    return {"prompt": f"{GAP} {' '.join(after)}\n{' '.join(before)}", "completion": f" {answer}"}


def make_source(paragraphs: Mapping[str, Sequence[str]], count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """Passages and the name of their source; each of LABELLED is the answer of as many rows, give or take one."""
    left = {name: dict.fromkeys(rng.sample(paragraphs[name], len(paragraphs[name]))) for name in LABELLED}
    rows = []
    for place in range(count):
        name = LABELLED[place % len(LABELLED)]
        rows.append(_take(left[name], partial(_source_row, name, rng), taken))
    rng.shuffle(rows)
    return rows


def _source_row(label: str, rng: random.Random, text: str) -> Row | None:
    words = text.split(" ")
    start = rng.randint(0, max(0, len(words) - WORDS))
    return {"prompt": f"{' '.join(words[start : start + WORDS])}\nSource:", "completion": f" {label}"}


def make_words(paragraphs: Mapping[str, Sequence[str]], count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """Passages and their long words in order, each with its number of letters: answers of about twenty tokens."""
    texts = [text for own in paragraphs.values() for text in own]
    rng.shuffle(texts)
    left = dict.fromkeys(texts)
    return [_take(left, partial(_words_row, rng), taken) for _ in range(count)]


def _words_row(rng: random.Random, text: str) -> Row | None:
    words = text.split(" ")
    start = rng.randint(0, max(0, len(words) - LISTED))
    passage = words[start : start + LISTED]
    bare = [re.sub(r"[^a-z]", "", word.lower()) for word in passage]
    long = [f"{word} {len(word)}" for word in bare if len(word) >= LONG]
    if len(long) < FEWEST_LONG:
        return None
    return {"prompt": f"{' '.join(passage)}\nLong words:", "completion": f" {', '.join(long)}"}


def _take(left: dict[str, None], make: Callable[[str], Row | None], taken: set[str]) -> Row:
    """The row of the first text ``left`` that gives a new one; no other row takes that text."""
    for text in left:
        row = make(text)
        if row is not None and row["prompt"] not in taken:
            taken.add(row["prompt"])
            del left[text]
            return row
    raise ValueError("the text has too few passages. Give more text, or ask for fewer rows.")


@dataclass(frozen=True)
class Task:
    """How a task's rows are made, and how its answers are read."""

    make: Callable[[Mapping[str, Sequence[str]], int, random.Random, set[str]], list[Row]]
    pattern: str | None
    """Of the answer in what is generated; none: all of it."""
    max_new_tokens: int
    """Of the longest answer, with some room."""
    most_answers: int
    """Held-out rows to answer, at most: a token costs as much as a row of an evaluation."""


FIRST_WORD = r"^\s*(\w+)"
TASKS = {
    "gap": Task(make_gap, FIRST_WORD, 4, 256),
    "source": Task(make_source, FIRST_WORD, 4, 256),
    "words": Task(make_words, None, 40, 64),
}


def write(paragraphs: Mapping[str, Sequence[str]], folder: Path, train: int, held_out: int, seed: int) -> None:
    """``folder/<name>/train.jsonl`` and ``eval.jsonl`` for every task."""
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        taken: set[str] = set()  # manuals repeat sentences: what is trained on shall not be asked for
        for part, count in (("train", train), ("eval", held_out)):
            rng = random.Random(f"{seed} {name} {part}")
            rows = task.make(of_part(paragraphs, part), count, rng, taken)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{part}.jsonl").write_text(text, encoding="utf-8")
