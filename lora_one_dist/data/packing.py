"""Several samples in one row: less padding, and rows of like cost.

In: token data.  Out: token data in which each sample is a row of whole documents, put together from the memory-mapped
samples when it is asked for.  Nothing is written; what keeps documents apart in the model are the position_ids of
:func:`~lora_one_dist.data.batches.collate`.  Runs on any rank, not collective; the same on every rank.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_one_dist.data.batches import IGNORE_INDEX
from lora_one_dist.data.samples import TokenData

if TYPE_CHECKING:
    from datasets import Dataset


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Put documents of ``lengths`` (n,), each in 1..room, into few rows of at most ``room`` tokens.  Pure.

    Best fit decreasing (arXiv 2404.10830): longest first, each into the row that it leaves least room in.  At most
    11/9 of the fewest rows possible, and some; n log n steps.

    Returns:
        ``order`` (n,) and ``starts`` (rows + 1,) int64: row i holds documents ``order[starts[i]:starts[i + 1]]``,
        ascending.
    """
    row_of, count = np.empty(len(lengths), dtype=np.int64), 0
    with_room: dict[int, list[int]] = {}  # rows by the tokens that still fit
    rooms: list[int] = []  # its keys, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, left = count, room - length
            count += 1
        else:
            left = rooms[at] - length
            row = with_room[rooms[at]].pop()
            if not with_room[rooms[at]]:
                del with_room[rooms.pop(at)]
        row_of[document] = row
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))]).astype(np.int64)
    return np.argsort(row_of, kind="stable"), starts


@dataclass(frozen=True)
class PackedRows:
    """Rows of documents: ``order`` and ``starts`` of :func:`best_fit` over the samples of a data set."""

    samples: Dataset
    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, row: int) -> np.ndarray:
        """The samples in a row."""
        return self.order[self.starts[row] : self.starts[row + 1]]

    def __getitem__(self, key: int | str) -> Any:
        """A row: input_ids, labels, lengths (tokens of each document), num_targets; or of all rows their num_targets.

        A document's first token is no target: it would be predicted from the document before.
        """
        if key == "num_targets":
            return np.add.reduceat(np.asarray(self.samples[key])[self.order], self.starts[:-1])
        assert not isinstance(key, str), f"{key}: no column of packed rows"
        held = self.samples[self.documents(key).tolist()]
        lengths = [len(document) for document in held["labels"]]
        labels = np.concatenate(held["labels"])
        labels[np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX
        return {
            "input_ids": np.concatenate(held["input_ids"]),
            "labels": labels,
            "lengths": lengths,
            "num_targets": int(sum(held["num_targets"])),
        }

    def with_format(self, kind: str) -> PackedRows:
        """The same rows from samples in another format of `datasets`."""
        return replace(self, samples=self.samples.with_format(kind))


@dataclass(frozen=True)
class PackedData(TokenData):
    """Token data whose samples are packed rows; ``rows`` are those of the documents, in the order of the rows."""

    unpacked: TokenData

    def rows_of(self, sample: int) -> list[int]:
        """The rows of the data that a packed row's documents were."""
        return self.unpacked.rows[self.dataset.documents(sample)].tolist()

    def squared_lengths(self) -> np.ndarray:
        """Summed over the documents of each row."""
        rows = self.dataset
        return np.add.reduceat(self.unpacked.lengths[rows.order] ** 2, rows.starts[:-1])

    def fingerprint(self) -> dict[str, Any]:
        """That of the documents, and which of them share a row."""
        held = self.unpacked.fingerprint()
        digest = hashlib.sha256(held["sha256"].encode())
        for numbers in (self.dataset.order, self.dataset.starts):
            digest.update(numbers.astype(np.int64).tobytes())
        return {"samples": len(self), "sha256": digest.hexdigest()}


def pack(tokens: TokenData, room: int) -> PackedData:
    """Rows of at most ``room`` tokens that hold every sample of ``tokens`` once, whole."""
    order, starts = best_fit(tokens.lengths, room)
    lengths = np.add.reduceat(tokens.lengths[order], starts[:-1])
    counts = (tokens.num_rows, tokens.num_truncated, tokens.num_without_targets, tokens.num_tokens, tokens.num_targets)
    return PackedData(
        PackedRows(tokens.dataset, order, starts), *counts, tokens.rows[order], lengths, tokens.notes, tokens
    )
