"""Public data sets as the papers trained on them: train.jsonl, and eval.jsonl where there is one.

    python tools/prepare_data.py metamath --source meta-math/MetaMathQA --out data/metamath
    python tools/prepare_data.py gsm8k --source openai/gsm8k --out data/gsm8k
    python tools/prepare_data.py code_feedback --source m-a-p/CodeFeedback-Filtered-Instruction --out data/code_feedback
    python tools/prepare_data.py commonsense --source /data/commonsense_170k.json --out data/commonsense
    python tools/prepare_data.py alpaca --source yahma/alpaca-cleaned --out data/alpaca --format chat
    python tools/prepare_data.py glue_mnli --source nyu-mll/glue --out data/glue_mnli

--source is a hub name, a folder (of files, a clone, what save_to_disk wrote), or a .json, .jsonl, .parquet or .csv
file. Rows keep their order, but for commonsense, which its authors shuffle. Each row is {"prompt": ..., "completion":
...} with the papers' template, or with --format chat {"messages": [...]} of the bare question and answer. Prints what
was dropped and why, and the SHA-256 of what it wrote (also in SHA256SUMS). The folder appears when it is whole.

| name           | kept                                                | train       | eval                          |
|----------------|-----------------------------------------------------|-------------|-------------------------------|
| metamath       | GSM types, fewer than 512 tokens                    | 100,000     | the next 10,000               |
| metamath_full  | all types, fewer than 512 tokens                    | all         | none                          |
| code_feedback  | with a code block, fewer than 1024 tokens, to the   | 100,000     | the next 10,000               |
|                | end of the first block                              |             |                               |
| commonsense    | all                                                 | all but 120 | 120, by seed 42               |
| alpaca         | all                                                 | all         | none                          |
| gsm8k          | all, final numbers without commas, no <<...>>       | train split | test split                    |
| glue_mnli, ... | all with a label, which is written as a word        | train split | validation (matched) split    |

Filters, order and templates are those of data.py in YuanheZ/LoRA-One (arXiv 2502.01235) and Outsider565/LoRA-GA (arXiv
2407.05000), whose shuffle(seed=42) of metamath and code_feedback is without effect: its result is not used. Tokens are
those of --tokenizer, in the papers Llama-2's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one_dist.commands import command_line
from lora_one_dist.config import paths
from lora_one_dist.convert import files
from lora_one_dist.data.cache import CacheError, writable_cache
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import Rows, load_rows, place_of
from lora_one_dist.data.tokenizer import load_tokenizer
from lora_one_dist.disk.lazy import ConversionError

TOKENIZER = "meta-llama/Llama-2-7b-hf"
COMMONSENSE_SEED = 42  # of the authors' train_test_split
COMMONSENSE_HELD_OUT = 120
COMMONSENSE_PARTS = {"train": "train", "eval": "test"}
BATCH = 1000  # rows tokenised at a time
ALPACA_INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
CALCULATION = re.compile(r"<<[^<>]*>>")  # of GSM8K's calculator
SIMILARITY = "semantic similarity of the text"  # so LoRA-GA's data.py calls entailment, too
FINAL_NUMBER = re.compile(r"(?<=####)[^\n]*$")
LABEL = "label"  # GLUE's column of a number; -1: not told

Row = Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """What becomes of the rows of one data set."""

    columns: tuple[str, ...]
    prompt: Callable[[Row], str]
    question: Callable[[Row], str]
    """Without a template: what the user says in a chat."""
    answer: Callable[[Row], str]
    drop: Callable[[Row], str | None] = lambda row: None
    """Why a row is left out, if it is."""
    below_tokens: int | None = None
    train: int | None = None
    """Rows to keep for training; none: all."""
    held_out: int = 0
    """Rows after those, for evaluation."""
    held_split: str | None = None
    """Or a split of its own."""
    configuration: str | None = None
    """Of the hub's data set, and of its clone the folder, where it has several."""
    labels: tuple[str, ...] = ()
    """What the numbers in LABEL mean."""


@dataclass
class Prepared:
    """Pairs (row, answer) by file, and why the others are not among them."""

    parts: dict[str, list[dict[str, Any]]]
    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0


def alpaca_prompt(row: Row) -> str:
    """The authors' two templates: with an input, the introduction is missing."""
    if row["input"]:
        return f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:\n"
    return f"{ALPACA_INTRODUCTION}### Instruction:\n{row['instruction']}\n\n### Response:\n"


def alpaca_question(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]


def first_code_block(row: Row) -> str:
    """The answer up to the end of its first code block."""
    before, _, rest = row["answer"].partition("```")
    return f"{before}```{rest.partition('```')[0]}```"


def gsm8k_answer(row: Row) -> str:
    """The worked answer without the calculator's notes; '#### 1,234' becomes '#### 1234'."""
    text = CALCULATION.sub("", row["answer"]).strip()
    return FINAL_NUMBER.sub(lambda found: " " + found.group().replace(",", "").strip(), text)


def _metamath(**filters: Any) -> Recipe:
    return Recipe(
        columns=("query", "response", "type"),
        prompt=lambda row: f"Q: {row['query']}\nA: ",
        question=lambda row: row["query"],
        answer=lambda row: row["response"].split("\nThe answer is:")[0],
        below_tokens=512,
        **filters,
    )


def _glue(task: str, what: str, columns: tuple[str, ...], labels: tuple[str, ...], held: str = "validation") -> Recipe:
    def question(row: Row) -> str:
        return f"classify the {what}: " + "\n".join(row[column] for column in columns)

    return Recipe(
        columns=(*columns, LABEL),
        prompt=lambda row: f"{question(row)}\nresult:",  # theirs ends with a space, which T5's tokenizer drops
        question=question,
        answer=lambda row: row[LABEL],
        drop=lambda row: None if row[LABEL] else "without a label",
        held_split=held,
        configuration=task,
        labels=labels,
    )


ALPACA = Recipe(
    columns=("instruction", "input", "output"),
    prompt=alpaca_prompt,
    question=alpaca_question,
    answer=lambda row: row["output"],
)
RECIPES = {
    "metamath": _metamath(
        drop=lambda row: None if "GSM" in row["type"] else "type without GSM", train=100_000, held_out=10_000
    ),
    "metamath_full": _metamath(),
    "code_feedback": Recipe(
        columns=("query", "answer"),
        prompt=lambda row: alpaca_prompt({"instruction": row["query"], "input": ""}),
        question=lambda row: row["query"],
        answer=first_code_block,
        drop=lambda row: None if "```" in row["answer"] else "no code block",
        below_tokens=1024,
        train=100_000,
        held_out=10_000,
    ),
    "commonsense": ALPACA,
    "alpaca": ALPACA,
    "gsm8k": Recipe(
        columns=("question", "answer"),
        prompt=lambda row: f"Q: {row['question']}\nA: ",
        question=lambda row: row["question"],
        answer=gsm8k_answer,
        drop=lambda row: None if "####" in row["answer"] else "no ####",
        held_split="test",
        configuration="main",
    ),
    "glue_cola": _glue("cola", "grammaticality of the text", ("sentence",), ("unacceptable", "acceptable")),
    "glue_sst2": _glue("sst2", "sentiment of the text", ("sentence",), ("negative", "positive")),
    "glue_mrpc": _glue("mrpc", SIMILARITY, ("sentence1", "sentence2"), ("different", "equivalent")),
    "glue_qnli": _glue(
        "qnli",
        "semantic similarity of the question and the sentence",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
    ),
    "glue_mnli": _glue(
        "mnli",
        SIMILARITY,
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        held="validation_matched",
    ),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--source", type=paths.name_argument, required=True, help="hub name, folder or file")
    parser.add_argument("--out", type=paths.argument, required=True, help="folder to make; must not exist")
    parser.add_argument("--format", choices=["completion", "chat"], default="completion", help="of the rows written")
    parser.add_argument("--limit", type=command_line.positive, help="write only the first rows of each file")
    parser.add_argument("--seed", type=int, help=f"of the split of commonsense ({COMMONSENSE_SEED})")
    parser.add_argument(
        "--tokenizer", type=paths.name_argument, help=f"folder or hub name, for filters by tokens ({TOKENIZER})"
    )
    return parser.parse_args(argv)


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Raises ConversionError for a setting without effect."""
    recipe, name = RECIPES[arguments.name], arguments.name
    for key, used in (("seed", name == "commonsense"), ("tokenizer", recipe.below_tokens is not None)):
        value = getattr(arguments, key)
        if value is not None and not used:
            raise ConversionError(f"--{key} {value}: has no effect on {name}. Leave it out.")


def read(name: str, source: str, split: str) -> Rows:
    """A split of the source, whose rows have the columns that the recipe reads."""
    path, recipe = Path(source), RECIPES[name]
    if recipe.held_split and path.is_file():
        rule = f"is one file, {name} has a split to train on and one to test"
        raise ConversionError(f"--source {source}: {rule}. Give the folder that holds both.")
    if recipe.configuration and (path / recipe.configuration).is_dir():
        path = path / recipe.configuration  # a clone of the hub's repository, which holds others too
    own = sorted(str(file) for file in path.iterdir() if re.match(rf"{split}[-.]", file.name)) if path.is_dir() else []
    if recipe.configuration and not path.exists():
        rows = _hub_configuration(source, recipe.configuration, split)
    elif (path / "dataset_dict.json").is_file():  # of save_to_disk
        rows = _saved(path, split)
    elif recipe.held_split and own:
        rows = load_rows(own, split, None)
    else:
        rows = load_rows(str(path) if path.exists() else source, split, None)
    missing = [column for column in recipe.columns if column not in rows.column_names]
    if missing:
        value = f"--source {source}: has columns {rows.column_names}, {name} needs {list(recipe.columns)}"
        raise ConversionError(f"{value}; missing: {missing}. Give the original data set, or rename its columns.")
    return rows


def _hub_configuration(source: str, configuration: str, split: str) -> Rows:
    import datasets

    try:
        return Rows([datasets.load_dataset(source, configuration, split=split)])
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        value = f"--source {source}: {configuration}, split {split}, cannot be loaded: {error}"
        raise ConversionError(f"{value}. Check name and network, or give a folder.") from error


def _saved(path: Path, split: str) -> Rows:
    import datasets

    splits = datasets.load_from_disk(str(path))
    if split not in splits:
        raise ConversionError(f"--source {path}: has {list(splits)}, must have {split}. Give the whole data set.")
    return Rows([splits[split]])


def checked(rows: Rows, recipe: Recipe, source: str) -> Iterator[dict[str, Any]]:
    """Rows of text, the recipe's columns alone.  Raises ConversionError for one that holds anything else."""
    numbered = [(-1, ""), *enumerate(recipe.labels)]
    words: dict[Any, str] = {kind(number): word for kind in (int, str) for number, word in numbered}  # CSV has text
    for number, whole in enumerate(rows):
        row = {column: whole.get(column) for column in recipe.columns}
        for column, value in row.items():
            is_label = column == LABEL and bool(recipe.labels)
            if not (type(value) in (int, str) and value in words if is_label else isinstance(value, str)):
                place = place_of(source, number)
                form = f"0 to {len(recipe.labels) - 1}, or -1" if is_label else "text"
                rule = f"{column} = {value!r:.80}, must be {form}. Mend the row, or take it out"
                raise ConversionError(f"{place}: {rule}.")
        yield row | ({LABEL: words[row[LABEL]]} if recipe.labels else {})


def written(recipe: Recipe, row: Row, form: str) -> dict[str, Any]:
    """The row of the JSONL file."""
    answer = recipe.answer(row)
    if form == "chat":
        turns = (("user", recipe.question(row)), ("assistant", answer))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    return {"prompt": recipe.prompt(row), "completion": f" {answer}"}  # the authors put a space between them


def select(recipe: Recipe, rows: Rows, source: str, form: str, tokenizer: Any, found: Prepared) -> list[dict[str, Any]]:
    """Rows that pass the filters, in their order; no more than the recipe takes."""
    wanted = None if recipe.train is None else recipe.train + recipe.held_out
    kept: list[dict[str, Any]] = []
    batch: list[dict[str, str]] = []
    for number, row in enumerate(checked(rows, recipe, source), start=1):
        found.read += 1
        reason = recipe.drop(row)
        if reason is not None:
            found.dropped[reason] += 1
        else:
            batch.append(row)
        if len(batch) == BATCH or number == len(rows):
            short = _below(recipe, batch, tokenizer)
            if len(short) < len(batch):
                found.dropped[f"{recipe.below_tokens} tokens or more"] += len(batch) - len(short)
            kept += [written(recipe, row, form) for row in short]
            batch = []
        if wanted is not None and len(kept) >= wanted:
            if beyond := len(rows) - number + len(kept) - wanted:
                found.dropped["after as many as are wanted"] += beyond
            found.read += len(rows) - number
            return kept[:wanted]
    return kept


def _below(recipe: Recipe, rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, str]]:
    if recipe.below_tokens is None or not rows:
        return rows
    texts = [recipe.prompt(row) + " " + recipe.answer(row) for row in rows]
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return [row for row, own in zip(rows, ids, strict=True) if len(own) < recipe.below_tokens]


def prepare(name: str, source: str, form: str, seed: int, tokenizer: Any) -> Prepared:
    """Rows by file.  Raises ConversionError or data.DataError: what cannot be read, or is not what the name says."""
    recipe, found = RECIPES[name], Prepared({})
    splits = {"train": "train"} | ({"eval": recipe.held_split} if recipe.held_split else {})
    for part, split in splits.items():
        rows = read(name, source, split)
        if name == "commonsense":
            found.parts |= _commonsense(rows, source, form, seed, found)
            continue
        kept = select(recipe, rows, source, form, tokenizer, found)
        end = len(kept) if recipe.train is None else recipe.train
        found.parts[part] = kept[:end]
        if kept[end:]:
            found.parts["eval"] = kept[end:]
    for part, kept in found.parts.items():
        if not kept:
            raise ConversionError(
                f"--source {source}: {found.read} rows, none of which is left for {part}.jsonl: dropped "
                f"{dict(found.dropped)}. Give the original data set."
            )
    return found


def _commonsense(rows: Rows, source: str, form: str, seed: int, found: Prepared) -> dict[str, list[dict[str, Any]]]:
    from datasets import Dataset

    if len(rows) <= COMMONSENSE_HELD_OUT:
        rule = f"must be more than the {COMMONSENSE_HELD_OUT} that are held out"
        raise ConversionError(f"--source {source}: {len(rows)} rows, {rule}. Give commonsense_170k.json.")
    held = list(checked(rows, ALPACA, source))
    found.read = len(held)
    split = Dataset.from_list(held).train_test_split(test_size=COMMONSENSE_HELD_OUT, shuffle=True, seed=seed)
    return {part: [written(ALPACA, row, form) for row in split[of]] for part, of in COMMONSENSE_PARTS.items()}


def write(found: Prepared, out: Path, limit: int | None) -> None:
    """Write the folder, which appears when it is whole."""
    texts = {
        part: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:limit]).encode()
        for part, rows in found.parts.items()
    }
    with files.new_folder(out, sum(map(len, texts.values()))) as partial:
        for part, text in texts.items():
            with open(partial / f"{part}.jsonl", "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


@command_line.tells_errors
def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        refuse_idle(arguments)
        files.refuse_existing(arguments.out)
        recipe, seed = RECIPES[arguments.name], arguments.seed
        needs = recipe.below_tokens is not None
        tokenizer = load_tokenizer(arguments.tokenizer or TOKENIZER, False) if needs else None
        seed = COMMONSENSE_SEED if seed is None else seed
        with writable_cache():
            found = prepare(arguments.name, arguments.source, arguments.format, seed, tokenizer)
        write(found, arguments.out, arguments.limit)
    except (DataError, CacheError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{found.read} rows read from {arguments.source}")
    for reason, count in sorted(found.dropped.items()):
        print(f"dropped {count}: {reason}")
    for part, rows in found.parts.items():
        count = min(len(rows), arguments.limit or len(rows))
        print(f"{arguments.out / part}.jsonl: {count} of {len(rows)} rows")
    print((arguments.out / files.CHECKSUMS).read_text(encoding="utf-8").rstrip())
    return 0
