"""Evaluation on held-out data: mean loss over target tokens, and exact match of greedy answers.

In: the model with its adapters, held-out tokens and prompts.  Out: numbers, the same on every rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from lora_one_dist.base import varlen
from lora_one_dist.base.blocks import blocks, has_encoder, parts
from lora_one_dist.base.loss import loss_sum
from lora_one_dist.base.sharding import Base
from lora_one_dist.base.two_stacks import whole_windows
from lora_one_dist.cluster import comm
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import place_of
from lora_one_dist.data.samples import TokenData

GENERATION_BATCH = 32  # prompts answered at a time for exact match
Progress = Callable[[str, int, int], None]  # label, done, total


@dataclass
class Held:
    """Held-out data: tokens, and for exact match (ids of the prompt, text of the completion)."""

    tokens: TokenData
    prompts: list[tuple[list[int], str]]
    tokenizer: Any


def evaluate(base: Base, config: Config, held: Held | None, progress: Progress, answers: bool) -> dict[str, float]:
    """Mean loss over the target tokens of the evaluation data and, with ``answers``, exact match.  Collective.

    Nothing without held-out data.  Leaves the module in eval mode.
    """
    if held is None:
        return {}
    base.module.eval()
    loss = torch.zeros((), dtype=torch.float64, device=comm.device())
    size, pad = config.train.micro_batch_size, held.tokenizer.pad_token_id
    rows = held.tokens.dataset.with_format("numpy")
    with torch.no_grad():
        dealt = batches.deal(len(held.tokens), size, comm.world_size(), comm.rank())
        for done, positions in enumerate(dealt, start=1):
            batch = batches.collate([rows[i] for i in positions or [0]], pad, weightless=not positions)
            loss += loss_sum(base.module, batch)
            progress("evaluate, micro-batches", done, len(dealt))
        values = {"eval_loss": float(comm.all_sum(loss.cpu())) / held.tokens.num_targets}
        if answers and held.prompts:
            with varlen.generating(base.module):
                values |= _answer_all(base, config, held, progress)
    base.release_all()
    return values


def scores(asked: torch.Tensor, answered: torch.Tensor, right: float) -> dict[str, float]:
    """The share of right answers, in [0, 1]; where references are two words, as CoLA's, also Matthews correlation.

    Args:
        asked, answered: how often each word was the reference, and the answer; of answers, what is neither comes last,
            a class of its own.

    Pure.  Source: Gorodkin, Computational Biology and Chemistry 28 (2004), R_K.
    """
    total = float(asked.sum())
    values = {"exact_match": right / total}
    if len(asked) == 2:
        covariance = right * total - float((asked * answered[:2]).sum())
        spread = (total**2 - float((answered**2).sum())) * (total**2 - float((asked**2).sum()))
        values["matthews"] = covariance / math.sqrt(spread) if spread > 0 else 0.0
    return values


def _answer_all(base: Base, config: Config, held: Held, progress: Progress) -> dict[str, float]:
    """Scores of greedy answers to the held-out prompts, against their references."""
    pattern, tokenizer = config.train.exact_match_pattern, held.tokenizer
    of_two = has_encoder(base.module)  # then padded as in training, and what is written has no prompt in front

    def beside(pads: list[int], real: list[int]) -> list[int]:
        return real + pads if of_two else pads + real

    asked_of = Counter(_answer(reference, pattern) for _, reference in held.prompts)
    place = {word: i for i, word in enumerate(asked_of)}
    counts = torch.zeros(len(place) + 2, dtype=torch.float64)  # of answers: each word, others, and right ones
    dealt = batches.deal(len(held.prompts), GENERATION_BATCH, comm.world_size(), comm.rank())
    for done, positions in enumerate(dealt, start=1):
        asked = [held.prompts[i] for i in positions or [0]]
        width = max(len(ids) for ids, _ in asked)
        ids = torch.tensor([beside([tokenizer.pad_token_id] * (width - len(ids)), ids) for ids, _ in asked])
        mask = torch.tensor([beside([0] * (width - len(ids)), [1] * len(ids)) for ids, _ in asked])
        if of_two:
            ids, mask = whole_windows(base.module, ids, mask)
        written = base.module.generate(
            input_ids=ids.to(comm.device()),
            attention_mask=mask.to(comm.device()),
            **how_to_write(base.module),
            max_new_tokens=config.train.exact_match_max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            repetition_penalty=1.0,
            # transformers does not know of our partitioning: ranks that finish early must keep gathering.
            synced_gpus=base.partitioned and comm.world_size() > 1,
        )
        texts = tokenizer.batch_decode(written if of_two else written[:, width:], skip_special_tokens=True)
        if positions:
            for text, (_, reference) in zip(texts, asked, strict=True):
                answer = _answer(text, pattern)
                counts[place.get(answer, len(place))] += 1
                counts[-1] += answer == _answer(reference, pattern)
        progress("exact match, batches of answers", done, len(dealt))
    *_, right = comm.all_sum(counts).tolist()
    return scores(torch.tensor([*asked_of.values()], dtype=torch.float64), counts[:-1], right)


def how_to_write(model: Any) -> dict[str, Any]:
    """What `generate` is told of a decoder beside an encoder: greedy, as some bring another number of beams.

    Its own cache has as many layers as the encoder, too few for a decoder that is deeper (transformers 5.23).
    """
    if not has_encoder(model):
        return {}
    encoder, decoder = (len(blocks(part)) for part in parts(model))
    deep = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if decoder > encoder else {}
    return {"num_beams": 1, **deep}


def _answer(text: str, pattern: str | None) -> str:
    """The last match of the pattern (its first group, if any), stripped, 1,234 as 1234; no match is ''.

    Without a pattern the whole text, stripped.
    """
    if pattern is None:
        return text.strip()
    found = [match.group(1) if match.re.groups else match.group() for match in re.finditer(pattern, text)]
    return re.sub(r"(?<=\d),(?=\d{3})", "", found[-1] or "").strip() if found else ""


def refuse_unmatched(
    pattern: str | None, prompts: Sequence[tuple[list[int], str]], rows: Sequence[int], source: str | list[str]
) -> None:
    """Raise DataError if the pattern finds no answer in a reference; ``rows`` of ``source`` are the prompts'.  Pure."""
    for row, (_, reference) in zip(rows, prompts, strict=True):
        if not _answer(reference, pattern):
            place = place_of(source, int(row))
            if pattern is None:
                raise DataError(f"{place}: its completion {reference!r} is no answer to match. Take the row out.")
            raise DataError(
                f"train.exact_match_pattern = {pattern!r}: finds no answer in the completion of {place}, "
                f"{reference!r:.80}. Correct the pattern, or leave it out to compare whole completions."
            )
