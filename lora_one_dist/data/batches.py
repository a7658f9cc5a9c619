"""Which sample goes into which micro-batch, by (seed, step) alone, and micro-batches as padded tensors.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch.nn.utils.rnn import pad_sequence

from lora_one_dist.config.seeds import seed_of

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation (num_samples,) int64 of an epoch's samples, a function of the arguments alone; do not write to it."""
    return permutation(num_samples, "order", seed, epoch)


def permutation(count: int, *purpose: str | int) -> torch.Tensor:
    """Permutation (count,) int64, a function of the arguments alone.  Pure."""
    generator = torch.Generator().manual_seed(seed_of(*purpose))
    return torch.randperm(count, generator=generator)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Optimizer steps that see every sample once; the last batch may be smaller."""
    return -(-num_samples // batch_size)


def global_batch(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Samples of optimizer step ``step`` (from 0, counted through all epochs), over all ranks."""
    epoch, position = divmod(step, steps_per_epoch(num_samples, batch_size))
    return epoch_order(num_samples, seed, epoch)[position * batch_size : (position + 1) * batch_size].tolist()


def deal(num_samples: int, micro_batch_size: int, world_size: int, rank: int) -> list[list[int]]:
    """One rank's micro-batches of positions 0..num_samples-1: micro-batch k goes to rank k % world_size.

    Every rank gets as many; one that is missing is an empty list, for which the caller runs a weightless sample.
    """
    rounds = -(-num_samples // (micro_batch_size * world_size))
    starts = [k * micro_batch_size for k in range(rank, rounds * world_size, world_size)]
    return [list(range(start, min(start + micro_batch_size, num_samples))) for start in starts]


def collate(samples: Sequence[Mapping], pad_token_id: int, *, weightless: bool = False) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels: (batch, longest) int64, padded on the right.

    Of samples for an encoder and a decoder (with ``encoder_length``) input_ids are the prompts and labels the
    completions, each as wide as its longest.

    Of packed rows (with ``lengths``) also position_ids, from 0 in each document; the padding is documents of its own,
    none longer than the batch's longest: some models' rotary frequencies follow the largest position.
    weightless: two tokens of the first sample without a label, for a rank that only has to join the collectives.
    """
    ids, labels = ([torch.as_tensor(sample[name]).long() for sample in samples] for name in ("input_ids", "labels"))
    if "encoder_length" in samples[0]:
        cuts = [int(sample["encoder_length"]) for sample in samples]
        ids = [row[:cut] for row, cut in zip(ids, cuts, strict=True)]
        labels = [row[cut:] for row, cut in zip(labels, cuts, strict=True)]
    if weightless:
        ids, labels = [ids[0][:2]], [torch.full_like(labels[0][:2], IGNORE_INDEX)]
    columns = {"input_ids": (ids, pad_token_id), "labels": (labels, IGNORE_INDEX)}
    columns["attention_mask"] = ([torch.ones_like(row) for row in ids], 0)
    batch = {name: pad_sequence(rows, batch_first=True, padding_value=pad) for name, (rows, pad) in columns.items()}
    if "lengths" in samples[0]:
        width = batch["input_ids"].shape[1]
        documents = [[width]] if weightless else [sample["lengths"] for sample in samples]
        longest = max(max(lengths) for lengths in documents)
        padding = torch.arange(width) % longest
        positions = [[*map(torch.arange, lengths), padding[: width - sum(lengths)]] for lengths in documents]
        batch["position_ids"] = torch.stack([torch.cat(row) for row in positions])
    return batch
