"""Make the worded-arithmetic task of the demo: train.jsonl and eval.jsonl, and the same as chats: chats.jsonl.

Enters: a seed and three row counts.
Leaves: <out>/train.jsonl and <out>/eval.jsonl, one {"prompt", "completion"} object per line, such as
    {"prompt": "Mia has 23 pens. Leo gives Mia 14 more. How many pens does Mia have now?\n",
     "completion": "23 + 14 = 37. The answer is 37."}
and <out>/chats.jsonl, one {"messages": [{"role", "content"}, ...]} per line: one to three such problems, each asked by
the user and answered by the assistant.
No prompt occurs twice, within a file or across them; every number and result lies in 2..99.

Remake: python tools/make_demo_data.py --seed 0 --train 4000 --eval 256 --chats 800 --out launch/demo/data
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

# The word lists are shared with make_demo_model.py, so that the base model has met every name and object.
NAMES = ("Mia", "Leo", "Ana", "Ben", "Eva", "Tom", "Zoe", "Sam", "Lily", "Max", "Nora", "Jack")
OBJECTS = (
    "marbles",
    "pens",
    "books",
    "cards",
    "shells",
    "coins",
    "stamps",
    "beads",
    "apples",
    "stickers",
    "buttons",
    "stones",
)
HOLDERS = (("boxes", "box"), ("bags", "bag"), ("trays", "tray"), ("jars", "jar"), ("baskets", "basket"))

SMALLEST, LARGEST, LARGEST_FACTOR = 2, 99, 10
LONGEST_CHAT = 3  # problems


class Template(NamedTuple):
    """A kind of problem: `steps` are the sums of its answer (r is the result of the step before)."""

    steps: tuple[str, ...]
    phrasings: tuple[str, ...]


TEMPLATES = (
    Template(
        ("a + b",),
        (
            "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?",
            "{n} has {a} {o} and buys {b} more {o}. How many {o} does {n} have now?",
            "{n} finds {a} {o} and later finds {b} more. How many {o} does {n} find in total?",
        ),
    ),
    Template(
        ("a + b",),
        (
            "{n} has {a} {o}. {m} has {b} {o}. How many {o} do they have together?",
            "There are {a} {o} in a {box} and {b} {o} in a second {box}. How many {o} are there in total?",
            "{n} buys {a} {o} and {m} buys {b} {o}. How many {o} do they buy in total?",
        ),
    ),
    Template(
        ("a - b",),
        (
            "{n} has {a} {o} and loses {b}. How many {o} does {n} have left?",
            "{n} has {a} {o}. {n} gives {b} {o} to {m}. How many {o} does {n} have left?",
            "There are {a} {o} in a {box}. {n} takes {b} of the {o}. How many {o} are left in the {box}?",
        ),
    ),
    Template(
        ("a - b",),
        (
            "{n} has {a} {o}. {m} has {b} {o}. How many more {o} does {n} have than {m}?",
            "{n} wants {a} {o} and has {b}. How many more {o} does {n} need?",
        ),
    ),
    Template(
        ("a * b",),
        (
            "There are {a} {boxes}. Each {box} holds {b} {o}. How many {o} are there in total?",
            "{n} has {a} {boxes} with {b} {o} in each {box}. How many {o} does {n} have?",
            "{n} buys {b} {o} a day for {a} days. How many {o} does {n} buy in total?",
        ),
    ),
    Template(
        ("a + b", "r - c"),
        (
            "{n} has {a} {o}. {n} buys {b} more and then loses {c}. How many {o} does {n} have left?",
            "{n} has {a} {o}. {m} gives {n} {b} more. Then {n} sells {c} {o}. How many {o} does {n} have now?",
        ),
    ),
    Template(
        ("a - b", "r + c"),
        (
            "{n} has {a} {o}. {n} sells {b} and then buys {c} more. How many {o} does {n} have now?",
            "{n} has {a} {o} and gives {b} to {m}. Then {n} finds {c} {o}. How many {o} does {n} have now?",
        ),
    ),
    Template(
        ("a + b", "r + c"),
        (
            "{n} has {a} {o}. {m} has {b} {o}. {k} has {c} {o}. How many {o} do they have together?",
            "{n} finds {a} {o}, then {b} more, then {c} more. How many {o} does {n} find in total?",
        ),
    ),
    Template(
        ("a * b", "r + c"),
        (
            "{n} buys {a} {boxes} of {b} {o} and {c} more {o}. How many {o} does {n} buy in total?",
            "{n} has {a} {boxes} with {b} {o} in each {box}. {m} has {c} {o}. How many {o} do they have together?",
        ),
    ),
    Template(
        ("a * b", "r - c"),
        (
            "{n} has {a} {boxes} with {b} {o} in each {box}. {n} sells {c} {o}. How many {o} does {n} have left?",
            "There are {a} {boxes} of {b} {o}. {n} takes {c} of the {o}. How many {o} are left?",
        ),
    ),
    Template(
        ("a + b", "a + r"), ("{n} has {a} {o}. {m} has {b} more {o} than {n}. How many {o} do they have together?",)
    ),
)


def compute(left: int, sign: str, right: int) -> int:
    """The value of one sum."""
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def draw_numbers(steps: tuple[str, ...], rng: random.Random) -> tuple[dict[str, int], list[str], int]:
    """Draw a, b and c until every result is in range; return them, the worked steps and the last result."""
    factors = steps[0] if "*" in steps[0] else ""
    while True:
        numbers = {x: rng.randint(SMALLEST, LARGEST_FACTOR if x in factors else LARGEST) for x in "abc"}
        known, worked = dict(numbers), []
        for step in steps:
            left, sign, right = step.split()
            x, y = known[left], known[right]
            known["r"] = compute(x, sign, y)
            worked.append(f"{x} {sign} {y} = {known['r']}.")
            if not SMALLEST <= known["r"] <= LARGEST:
                break
        else:
            return numbers, worked, known["r"]


def make_problem(rng: random.Random) -> dict[str, str]:
    """One row: a template, a phrasing, names, an object and numbers, all drawn at random."""
    template = rng.choice(TEMPLATES)
    n, m, k = rng.sample(NAMES, 3)
    boxes, box = rng.choice(HOLDERS)
    numbers, worked, result = draw_numbers(template.steps, rng)
    question = rng.choice(template.phrasings).format(
        n=n, m=m, k=k, o=rng.choice(OBJECTS), boxes=boxes, box=box, **numbers
    )
    return {"prompt": question + "\n", "completion": " ".join(worked) + f" The answer is {result}."}


def make_rows(count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` rows with distinct prompts."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = make_problem(rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def make_chats(rows: list[dict[str, str]], count: int, rng: random.Random) -> list[dict[str, list[dict[str, str]]]]:
    """`count` chats of the first rows, in their order; each row is used once."""
    left, chats = iter(rows), []
    for _ in range(count):
        turns = [(row["prompt"].rstrip(), row["completion"]) for row in islice(left, rng.randint(1, LONGEST_CHAT))]
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        chats.append({"messages": messages})
    return chats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("launch/demo/data"))
    parser.add_argument("--train", type=int, default=4000, metavar="N")
    parser.add_argument("--eval", type=int, default=256, metavar="N")
    parser.add_argument("--chats", type=int, default=800, metavar="N")
    args = parser.parse_args()

    rows = make_rows(args.train + args.eval + LONGEST_CHAT * args.chats, random.Random(args.seed))
    of_chats = rows[args.train + args.eval :]
    parts: dict[str, list[Any]] = {
        "train": rows[: args.train],
        "eval": rows[args.train : args.train + args.eval],
        "chats": make_chats(of_chats, args.chats, random.Random(args.seed)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8", newline="\n")
        print(f"{path}: {len(part)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
