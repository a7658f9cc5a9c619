"""Tokenised data as a run uses them: samples by number, and what became of the rows.

In: rows, a tokenizer, :class:`DataConfig`.  Out: :class:`TokenData` over a memory-mapped file.  Runs on any rank, not
collective.  Peak memory: some chunks of 500 rows a process, and 64 bytes per sample of counts.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data import store
from lora_one_dist.data.encode import Encoder, chat_column
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import Rows, placing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Counts of the file, and what they are when somebody is told.
NOTES = {
    "added_nulls": "nulls that the files' types had added were left out",
    "dropped_thoughts": "thoughts of earlier turns are not in the text: the chat template leaves them out",
    "control_tokens": "rows hold special tokens of the model in what users say: it reads them as its own",
}


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
    notes: tuple[str, ...]  # what else happened to rows

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
    rows: Rows,
    tokenizer: Tokenizer,
    config: DataConfig,
    source: str | list[str] | None = None,
    only: np.ndarray | None = None,
    *,
    date: datetime.date | None = None,
    with_encoder: bool = False,
    ranks: int = 0,
    say: Callable[[str], None] | None = None,
) -> TokenData:
    """Token ids and labels of every row, cut at ``config.max_length``; rows without a target are dropped and counted.

    Args:
        source: where `load_rows` read the rows, to name the place of a bad one.
        only: numbers of the rows to take, as if there were no others; all are tokenised, so that those held out find
            theirs in the cache.
        date: for chat templates that print it; none: ``config.date``, or today.
        with_encoder: are the samples for a model of an encoder and a decoder?
        ranks: of this host, which take a core each; the other cores tokenise (``config.workers``).
        say: is told the progress.

    Raises DataError: no chat template for chats, a column missing or null, a row that does not fit the format, a
    template that rewrites earlier turns, or no row with a target.
    """
    from datasets import Dataset

    encoder = Encoder(tokenizer, config, date or config.date or datetime.date.today(), with_encoder)
    _refuse_missing_columns(rows, encoder, source)
    workers = config.workers or max(1, len(os.sched_getaffinity(0)) - ranks)
    with placing(source):
        path = store.cached(rows, encoder, workers, say)
    mapped = Dataset.from_file(str(path))
    taken = np.arange(len(rows)) if only is None else only
    targets, cut = (mapped.data.column(name).to_numpy()[taken] for name in ("num_targets", "is_cut"))
    kept = targets > 0
    if not kept.any():
        raise DataError(_why_no_targets(rows, config, int(cut.sum()), len(taken)))
    numbers = taken[kept].astype(np.int64)
    lengths = _lengths(mapped)[numbers]
    counted = {name: int(mapped.data.column(name).to_numpy()[taken].sum()) for name in NOTES}
    dataset = mapped.remove_columns(["is_cut", *NOTES])
    dataset = dataset if len(numbers) == len(rows) else dataset.select(numbers)
    dropped, notes = int((~kept).sum()), tuple(f"{n} {NOTES[name]}" for name, n in counted.items() if n)
    counts = (len(taken), int(cut.sum()), dropped, int(lengths.sum()), int(targets.sum()))
    return TokenData(dataset, *counts, numbers, lengths, notes)


def _lengths(mapped: Any) -> np.ndarray:
    """(rows,) int64: tokens of each row."""
    chunks = mapped.data.column("input_ids").chunks
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks]).astype(np.int64)


def _why_no_targets(rows: Rows, config: DataConfig, cut: int, count: int) -> str:
    value = f"data.max_length = {config.max_length}: cuts {cut} of {count} rows, none has a token to learn. Raise it"
    if config.format != "chat" or cut:
        return f"{value}; a chat needs a message of role 'assistant'."
    first = rows[0]
    roles = {message.get("role", message.get("from")) for message in first[chat_column(first, config)]}
    value = f"none of {count} rows has a token to learn: the first has the roles {sorted(map(str, roles))}"
    return f"{value}. A chat needs a message of role 'assistant', with a weight of 1 where it has one."


def load_eval_prompts(
    rows: Rows,
    tokenizer: Tokenizer,
    config: DataConfig,
    indices: Iterable[int],
    source: str | list[str] | None = None,
    with_encoder: bool = False,
) -> list[tuple[list[int], str]]:
    """(ids of the prompt alone, as generation sees it, and text of the completion) of rows of format completion.

    Of a prompt of more than ``config.max_length`` tokens the last ones are kept.  Raises DataError as `tokenize`.
    """
    encoder, prompts = Encoder(tokenizer, config, datetime.date.min, with_encoder), []
    _refuse_missing_columns(rows, encoder, source)
    for index in indices:
        with placing(source):
            read = encoder.read(rows[index], index)
        prompt = read.prompt or ""
        ids, bare = (encoder.ids([prompt], special)[0] for special in (True, False))
        if with_encoder:
            ids = encoder.read_by_encoder(ids)
        elif ids[len(ids) - len(bare) :] != bare:
            ids = ids[:-1]  # a tokenizer that closes every text would end the answer before it starts
        prompts.append((ids[-config.max_length :], read.text.removeprefix(prompt)))
    return prompts


def _refuse_missing_columns(rows: Rows, encoder: Encoder, source: str | list[str] | None) -> None:
    """By the first row; of JSON the others may have others."""
    config = encoder.config
    with placing(source):
        first = rows[0]
    needed = encoder.columns if config.format != "chat" else [chat_column(first, config)]
    if config.tools not in ("auto", "none"):
        needed = [*needed, config.tools]
    if missing := [name for name in needed if name not in first]:
        where = "the data" if source is None else source if isinstance(source, str) else source[0]
        value = f"data.format = {config.format}: reads columns {missing}, {where} has {list(first)}"
        raise DataError(f"{value}. Name its columns in data.prompt and data.completion, data.messages or data.text.")
