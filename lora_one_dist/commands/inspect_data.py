"""What will the model see?  Samples with their targets marked, and what became of the rows.

    python tools/inspect_data.py --config launch/configs/demo.yaml
    python tools/inspect_data.py --config launch/configs/mine.yaml --samples 10 --eval data.max_length=512
    python tools/inspect_data.py --config launch/configs/mine.yaml --plain data.packing=true | less

Shows the samples that the run's first step takes (with --eval the first held out), then rows, tokens, lengths, steps.
Colours on a terminal; --plain, NO_COLOR or a pipe put targets in [[...]] instead.  Reads tokenizer and data and no
weights; what it tokenises the run finds in the cache.  Exit code 2: the config is refused; 1: the data are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from lora_one_dist.base.skeleton import ModelError
from lora_one_dist.base.towers import describes_encoder
from lora_one_dist.base.two_stacks import refuse_for_one_stack
from lora_one_dist.commands import command_line
from lora_one_dist.config.reading import ConfigError, load_config
from lora_one_dist.config.settings import Config
from lora_one_dist.data import batches, packing
from lora_one_dist.data.cache import CacheError, writable_cache
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows, place_of
from lora_one_dist.data.samples import TokenData, tokenize
from lora_one_dist.data.split import evaluation_rows, training_data
from lora_one_dist.data.tokenizer import add_tokens, load_tokenizer

EXIT_BAD_CONFIG = 2
PERCENTILES = (0, 10, 50, 90, 99, 100)
# ANSI colours by (is a target, is a special token).
COLOURS = {(True, False): "32", (True, True): "1;32", (False, False): "39", (False, True): "1;35"}
RESET = "\033[0m"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--samples", type=command_line.positive, default=3, help="samples, or packed rows, to show (3)")
    parser.add_argument("--eval", action="store_true", help="the evaluation data instead of the training data")
    parser.add_argument("--plain", action="store_true", help="targets in [[...]] instead of colours")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args(argv)


def read(config: Config, tokenizer: Any, evaluation: bool) -> tuple[TokenData, str | list[str]]:
    """Training or evaluation data as the run reads them, and where their rows are from."""
    settings, rows = config.data, None
    how: dict[str, Any] = {"with_encoder": _has_encoder(config), "say": command_line.tell}
    if not evaluation or settings.eval_fraction is not None:
        rows = load_rows(settings.train, settings.train_split, settings.max_train_samples)
    if not evaluation and rows is not None:
        return training_data(rows, tokenizer, settings, **how), settings.train
    found = evaluation_rows(settings, rows)
    if found is None:
        raise DataError("--eval: the config names no evaluation data. Give data.eval or data.eval_fraction.")
    held, numbers, source = found
    return tokenize(held, tokenizer, settings, source, numbers, **how), source


def _has_encoder(config: Config) -> bool:
    """By config.json alone, without which a folder may hold a tokenizer.  Raises ModelError for what does not fit."""
    try:
        described, _ = PreTrainedConfig.get_config_dict(config.model.path)
    except OSError:
        return False
    if not describes_encoder(described):
        return False
    refuse_for_one_stack(f"a {described['model_type']}", config)
    return True


def runs(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[tuple[bool, bool], str]]:
    """((is a target, is a special token), text) of the longest stretches of one kind.

    Texts are differences of the beginnings': a stretch decoded alone may lose a space in front.
    """
    special = set(tokenizer.all_special_ids)
    # The first token has a label where nothing is masked, but nothing predicts it.
    kinds = [(i > 0 and labels[i] != batches.IGNORE_INDEX, ids[i] in special) for i in range(len(ids))]
    before, at = "", 0
    for kind, group in itertools.groupby(kinds):
        at += len(list(group))
        text = tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)
        yield kind, text.removeprefix(before)
        before = text


def printable(text: str) -> str:
    """Text without what would move the cursor or change colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def paint(ids: Sequence[int], labels: Sequence[int], tokenizer: Any, plain: bool) -> str:
    """A document's text with its targets marked."""
    parts = []
    for is_target, group in itertools.groupby(runs(ids, labels, tokenizer), key=lambda run: run[0][0]):
        texts = [(kind, printable(text)) for kind, text in group]
        if plain:
            joined = "".join(text for _, text in texts)
            parts.append(f"[[{joined}]]" if is_target else joined)
        else:
            parts += [f"\033[{COLOURS[kind]}m{text}{RESET}" for kind, text in texts]
    return "".join(parts)


def show(tokens: TokenData, number: int, source: str | list[str], tokenizer: Any, plain: bool) -> Iterator[str]:
    """Lines for one sample, or for each document of a packed row."""
    sample, rows = tokens.dataset[number], tokens.rows_of(number)
    lengths = sample.get("lengths", [len(sample["input_ids"])])
    of_all = f"{len(sample['input_ids'])} tokens, {sample['num_targets']} targets"
    if "lengths" in sample:
        yield f"--- packed row {number}: {len(rows)} documents, {of_all}"
    starts = [0, *itertools.accumulate(lengths)]
    for row, (start, stop) in zip(rows, itertools.pairwise(starts), strict=True):
        ids, labels = (np.asarray(sample[name][start:stop]).tolist() for name in ("input_ids", "labels"))
        targets = sum(label != batches.IGNORE_INDEX for label in labels[1:])
        if "lengths" in sample:  # by number: to find the lines of a row's many documents takes a while
            yield f"  - document of row {row} (the first is 0), {len(ids)} tokens, {targets} targets"
        else:
            yield f"--- sample {number}: {place_of(source, row)}, {of_all}"
        yield paint(ids, labels, tokenizer, plain)
    yield ""


def totals(tokens: TokenData, config: Config, evaluation: bool) -> Iterator[str]:
    """What became of the rows, and what a step is."""
    limit, count = config.data.max_length, len(tokens)
    yield (
        f"{tokens.num_rows} rows: {tokens.num_without_targets} dropped without targets, {tokens.num_truncated} cut at "
        f"{limit} tokens, {len(tokens.rows)} samples"
    )
    yield from tokens.notes
    share = tokens.num_targets / tokens.num_tokens
    yield f"{tokens.num_tokens} tokens, {tokens.num_targets} of them targets ({share:.1%})"
    documents = tokens.unpacked if isinstance(tokens, packing.PackedData) else tokens
    at = np.percentile(documents.lengths, PERCENTILES, method="nearest").tolist()
    yield "tokens a sample: " + ", ".join(f"{n} at {p} %" for p, n in zip(PERCENTILES, at, strict=True))
    if isinstance(tokens, packing.PackedData):
        fill = tokens.num_tokens / (count * limit)
        yield f"{count} packed rows, {fill:.1%} full, {len(tokens.rows) / count:.2f} documents a row"
    if evaluation:
        return
    size = config.train.global_batch_size
    steps = batches.steps_per_epoch(count, size)
    what = "packed rows" if isinstance(tokens, packing.PackedData) else "samples"
    yield (
        f"{steps} steps an epoch, {size} {what} each: {tokens.num_tokens / steps:.0f} tokens and "
        f"{tokens.num_targets / steps:.0f} targets a step on average"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    plain = arguments.plain or bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    try:
        config = load_config(arguments.config, arguments.overrides, command_line.tell)
        tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
        add_tokens(tokenizer, config.lora.new_tokens or [])
        with writable_cache():
            tokens, source = read(config, tokenizer, arguments.eval)
    except (ConfigError, DataError, CacheError, ModelError) as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG if isinstance(error, ConfigError) else 1
    first = range(len(tokens)) if arguments.eval else batches.epoch_order(len(tokens), config.train.seed, 0).tolist()
    if plain:
        print("targets are in [[...]]\n")
    else:
        names = {(True, False): "target", (False, False): "context", (False, True): "special", (True, True): "both"}
        print(", ".join(f"\033[{COLOURS[kind]}m{name}{RESET}" for kind, name in names.items()) + "\n")
    for number in first[: arguments.samples]:
        for line in show(tokens, number, source, tokenizer, plain):
            print(line)
    for line in totals(tokens, config, arguments.eval):
        print(line)
    return 0
