"""Which rows are trained on and which are held out: functions of their number and the settings alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data import batches
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.packing import pack
from lora_one_dist.data.rows import Rows, load_rows
from lora_one_dist.data.samples import TokenData, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def held_out(num_rows: int, fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on and of those held out, ascending int64: a function of the arguments alone.

    At least one of each; without a fraction none is held out.  Raises DataError: there is only one row.
    """
    if fraction is None:
        return np.arange(num_rows), np.arange(0)
    if num_rows < 2:
        value = f"data.eval_fraction = {fraction}: the training data has {num_rows} row, both sides need one"
        raise DataError(f"{value}. Add data, or give data.eval.")
    shuffled = batches.permutation(num_rows, "held out").numpy()
    held = min(max(1, round(num_rows * fraction)), num_rows - 1)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def evaluation_rows(config: DataConfig, train_rows: Rows | None) -> tuple[Rows, np.ndarray, str | list[str]] | None:
    """What to evaluate on: rows, the numbers of those that count, and where the rows are from; None: not at all."""
    if config.eval is not None:
        rows = load_rows(config.eval, config.eval_split, config.max_eval_samples)
        return rows, np.arange(len(rows)), config.eval
    if config.eval_fraction is not None and train_rows is not None:
        return train_rows, held_out(len(train_rows), config.eval_fraction)[1], config.train
    return None


def training_data(rows: Rows, tokenizer: Tokenizer, config: DataConfig, **how: Any) -> TokenData:
    """What to train on of the rows of ``config.train``: without those held out, packed if it says so.

    ``how``: the other arguments of :func:`~lora_one_dist.data.samples.tokenize`.

    Raises DataError as :func:`~lora_one_dist.data.samples.tokenize` and :func:`held_out`.
    """
    only = None if config.eval_fraction is None else held_out(len(rows), config.eval_fraction)[0]
    tokens = tokenize(rows, tokenizer, config, config.train, only, **how)
    return pack(tokens, config.max_length) if config.packing else tokens
