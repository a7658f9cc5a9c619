"""Rows to tokens and to what carries a loss.

In: rows, a tokenizer, :class:`DataConfig`.  Out: ids and labels in a memory-mapped Arrow file, which a later process
with the same inputs finds in the cache of `datasets`.  Runs on any rank, not collective.  Peak memory: 1000 rows, and
24 bytes per sample of counts.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.batches import IGNORE_INDEX
from lora_one_dist.data.chat import chat_texts
from lora_one_dist.data.rows import DataError, RowError, placing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

# The settings that change a row's tokens; the others may change without making a cached result stale.
TOKEN_FIELDS = {"format", "prompt", "completion", "messages", "text", "loss_on", "max_length"}


@dataclass(frozen=True)
class TokenData:
    """Samples to train on, as many as ``len()``, and what became of the rows that came in."""

    dataset: Any  # rows by number: input_ids, labels (-100: no loss), prompt_length (ids before the first), num_targets
    num_rows: int  # that came in
    num_truncated: int  # of those, with or without targets
    num_without_targets: int  # dropped: no token of theirs carries a loss
    num_tokens: int  # in `dataset`
    num_targets: int  # in `dataset`: labels[1:] != -100, the tokens that are predicted
    rows: np.ndarray  # (len,) int64: the row that each sample was, counted before any was dropped; see `place_of`
    lengths: np.ndarray  # (len,) int64: tokens of each sample

    def __len__(self) -> int:
        return len(self.dataset)

    def rows_of(self, sample: int) -> list[int]:
        """The rows that are in a sample: one, or of a packed row those of its documents."""
        return [int(self.rows[sample])]

    def squared_lengths(self) -> np.ndarray:
        """(len,) int64: the squared length of each sample, of a packed row the sum over its documents."""
        return self.lengths**2

    def fingerprint(self) -> dict[str, Any]:
        """What tells one tokenised data set from another: number of samples, and SHA-256 of every id and label.

        Reads all of it once (about 1 s a gigabyte).  Not collective.
        """
        digest = hashlib.sha256()
        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            for name in ("input_ids", "labels"):
                for chunk in table.column(name).chunks:
                    digest.update(np.diff(chunk.offsets.to_numpy()).astype(np.int64).tobytes())
                    digest.update(chunk.flatten().to_numpy().astype(np.int32).tobytes())
        return {"samples": len(self), "sha256": digest.hexdigest()}


def tokenize(
    rows: Dataset,
    tokenizer: Tokenizer,
    config: DataConfig,
    source: str | list[str] | None = None,
    only: np.ndarray | None = None,
) -> TokenData:
    """Token ids and labels of every row, cut at ``config.max_length``; rows without a target are dropped and counted.

    ``source``: where `load_rows` read the rows, to name the place of a bad one.  ``only``: numbers of the rows to take,
    as if there were no others; all are tokenised, so that those held out find theirs in the cache.

    Raises DataError: no chat template for chats, a column missing or null, a row that does not fit the format, a
    template that rewrites earlier turns, or no row with a target.
    """
    from datasets import Features, List, Value

    if config.format == "chat" and not tokenizer.chat_template:
        value = f"data.format = chat: the tokenizer {tokenizer.name_or_path} has no chat template, which it needs"
        raise DataError(f"{value}. Take the instruction-tuned model's tokenizer, or use data.format completion.")
    columns = _columns(rows, config, source)
    settings = DataConfig(train="", **config.model_dump(include=TOKEN_FIELDS))
    # `datasets` hashes a module's function by its name only: without this an edit here would meet stale results.
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    counts = dict.fromkeys(("prompt_length", "num_targets", "uncut_length"), Value("int64"))
    with placing(source):
        mapped = rows.select_columns(columns).map(
            _encode_rows,
            batched=True,
            with_indices=True,
            remove_columns=columns,
            features=Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), **counts}),
            fn_kwargs={"tokenizer": tokenizer, "config": settings, "code": code},
            desc="tokenize",
        )
    taken = np.arange(len(rows)) if only is None else only
    targets, lengths = (mapped.data.column(name).to_numpy()[taken] for name in ("num_targets", "uncut_length"))
    kept, truncated = targets > 0, lengths > config.max_length
    if not kept.any():
        value = f"data.max_length = {config.max_length}: cuts {truncated.sum()} of {len(taken)} rows"
        raise DataError(f"{value}, none has a token to learn. Raise it; a chat needs a message of role 'assistant'.")
    numbers, lengths = taken[kept].astype(np.int64), lengths[kept].clip(max=config.max_length)
    dataset = mapped.remove_columns("uncut_length")
    dataset = dataset if len(numbers) == len(rows) else dataset.select(numbers)
    cut, dropped = int(truncated.sum()), int((~kept).sum())
    return TokenData(dataset, len(taken), cut, dropped, int(lengths.sum()), int(targets.sum()), numbers, lengths)


def load_eval_prompts(
    rows: Dataset,
    tokenizer: Tokenizer,
    config: DataConfig,
    indices: Iterable[int],
    source: str | list[str] | None = None,
) -> list[tuple[list[int], str]]:
    """(ids of the prompt alone, as generation sees it, and text of the completion) of rows of format completion.

    Of a prompt of more than ``config.max_length`` tokens the last ones are kept.  Raises DataError as `tokenize`.
    """
    rows, prompts = rows.select_columns(_columns(rows, config, source)), []
    for index in indices:
        with placing(source):
            whole, prompt = _texts(rows[index], index, tokenizer, config)
        ids, bare = (_ids(tokenizer, [prompt], special)[0] for special in (True, False))
        if ids[len(ids) - len(bare) :] != bare:
            ids = ids[:-1]  # a tokenizer that closes every text would end the answer before it starts
        prompts.append((ids[-config.max_length :], whole.removeprefix(prompt)))
    return prompts


def _columns(rows: Dataset, config: DataConfig, source: str | list[str] | None) -> list[str]:
    """The columns that the format reads, all of them present."""
    template = config.prompt + config.completion
    named = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name)
    columns = {"completion": list(named), "chat": [config.messages], "text": [config.text]}[config.format]
    if missing := [name for name in columns if name not in rows.column_names]:
        where = "the data" if source is None else source if isinstance(source, str) else source[0]
        value = f"data.format = {config.format}: reads columns {missing}, {where} has {rows.column_names}"
        raise DataError(f"{value}. Name its columns in data.prompt and data.completion, data.messages or data.text.")
    return columns


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _encode_rows(batch: Mapping[str, list], indices: list[int], tokenizer: Any, config: DataConfig, code: str) -> dict:
    """What `Dataset.map` calls: a function of its arguments alone (``code`` is there to be hashed)."""
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    texts = [_texts(row, index, tokenizer, config) for row, index in zip(rows, indices, strict=True)]
    # A chat's special tokens are all in its template.
    ids = iter(_ids(tokenizer, [text for row in texts for text in row], special=config.format != "chat"))
    samples = [_encode([next(ids) for _ in row], tokenizer.eos_token_id, config) for row in texts]
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _texts(row: Mapping[str, Any], index: int, tokenizer: Any, config: DataConfig) -> list[str]:
    """A row's text, then those beginnings of it that end where loss starts, stops, starts, ..."""
    from jinja2 import TemplateError

    try:
        if null := [name for name, value in row.items() if value is None]:
            raise DataError(f"columns {null} are null or missing. Fill them, or take the row out")
        if config.format == "completion":
            prompt = config.prompt.format(**row)
            return [prompt + config.completion.format(**row), prompt]
        if config.format == "chat":
            return chat_texts(row[config.messages], tokenizer, config)
        if not isinstance(row[config.text], str):
            raise DataError(f"{config.text} = {row[config.text]!r:.80}: must be a string. Mend the row")
        return [row[config.text]]
    except (TemplateError, LookupError, ValueError, TypeError) as error:
        remedy = "" if isinstance(error, DataError) else ": the template cannot take the row. Mend one of them"
        raise RowError(index, f"{error}{remedy}.") from error


def _encode(ids: list[list[int]], eos: int | None, config: DataConfig) -> dict[str, Any]:
    """One sample from the ids of a row's text and of the text's beginnings."""
    whole, *beginnings = ids
    # Tokens merge across a border ("A: " + "b" holds a token " b"), so the ids of a beginning need not begin the whole.
    # Generation sees the beginning tokenised alone: what both share is what it is given, the rest is to be learnt.
    borders = [_common_prefix(beginning, whole) for beginning in beginnings]
    if config.loss_on == "all" or config.format == "text":
        borders = [0]
    if config.format != "chat" and eos is not None and whole[-1:] != [eos]:
        whole = [*whole, eos]
    labels = [IGNORE_INDEX] * len(whole)
    for start, stop in zip(borders[::2], [*borders[1::2], len(whole)], strict=False):
        labels[start:stop] = whole[start:stop]
    input_ids, labels = whole[: config.max_length], labels[: config.max_length]
    num_targets = sum(label != IGNORE_INDEX for label in labels[1:])
    counts = {"prompt_length": min([*borders[:1], len(input_ids)]), "num_targets": num_targets}
    return {"input_ids": input_ids, "labels": labels, **counts, "uncut_length": len(whole)}


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
