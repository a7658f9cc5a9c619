"""Rows held out: which, and that both sides know their own numbers in the data."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.config.settings import DataConfig
from lora_one_dist.data.errors import DataError
from lora_one_dist.data.rows import load_rows
from lora_one_dist.data.samples import load_eval_prompts, tokenize
from lora_one_dist.data.split import evaluation_rows, held_out, training_data
from tests.data.helpers import build_tokenizer, config, dataset
from tests.ranks import write_json_lines


def test_a_share_of_the_rows_is_held_out():
    train, held = held_out(1000, 0.1)
    assert (len(train), len(held)) == (900, 100)
    assert sorted([*train, *held]) == list(range(1000))
    assert (train.tolist(), held.tolist()) == (sorted(train), sorted(held))
    thirds = [sum(third * 334 <= row < (third + 1) * 334 for row in held) for third in range(3)]
    assert min(thirds) > 15, "from everywhere"
    torch.manual_seed(5)
    assert held_out(1000, 0.1)[1].tolist() == held.tolist()
    assert [len(held_out(n, f)[1]) for n, f in ((2, 0.9), (2, 0.01), (10, 0.001), (10, 0.999))] == [1, 1, 1, 9]
    assert held_out(10, 0.3)[1].tolist() == [1, 6, 7], "old runs can no longer be resumed or repeated"
    message = r"data\.eval_fraction = 0\.5: the training data has 1 row, both sides need one\. Add data, or give data"
    with pytest.raises(DataError, match=message):
        held_out(1, 0.5)


def test_both_sides_are_tokenised_once_and_keep_their_row_numbers(tmp_path):
    tokenizer = build_tokenizer()
    rows = dataset(*({"prompt": "q" * (i % 7), "completion": f"r{i}"} for i in range(20)))
    settings = DataConfig(train="rows.jsonl", max_length=7, eval_fraction=0.25)
    train = training_data(rows, tokenizer, settings)
    found = evaluation_rows(settings, rows)
    assert found is not None
    same_rows, numbers, source = found
    assert (same_rows, source) == (rows, "rows.jsonl")
    held = tokenize(rows, tokenizer, settings, source, numbers)
    everything = tokenize(rows, tokenizer, config(max_length=7))
    assert {f["filename"] for f in train.dataset.cache_files} == {f["filename"] for f in held.dataset.cache_files}
    assert (train.num_rows, held.num_rows) == (15, 5)
    assert sorted([*train.rows, *held.rows]) == everything.rows.tolist()
    at = {int(row): i for i, row in enumerate(everything.rows)}
    for part in (train, held):
        for i, row in enumerate(part.rows):
            assert part.dataset[i] == everything.dataset[at[int(row)]]
        assert part.num_targets == sum(part.dataset["num_targets"])
        assert part.num_tokens == part.lengths.sum() == sum(map(len, part.dataset["input_ids"]))
    for count in ("num_truncated", "num_without_targets", "num_tokens", "num_targets"):
        assert getattr(train, count) + getattr(held, count) == getattr(everything, count), count
    assert everything.num_without_targets > 0
    assert evaluation_rows(config(), rows) is None


def test_prompts_of_rows_held_out_and_the_place_of_a_bad_one(tmp_path):
    """The rows' own numbers, not those among the rows held out."""
    from lora_one_dist.train import evaluate

    _, numbers = held_out(20, 0.25)
    bad = int(numbers[2])
    rows = [{"prompt": f"q{i}", "completion": "none" if i == bad else f"is {i}"} for i in range(20)]
    source = str(write_json_lines(tmp_path / "rows.jsonl", rows))
    loaded = load_rows(source, "", None)
    prompts = load_eval_prompts(loaded, build_tokenizer(), config(), numbers.tolist(), source)
    assert [reference for _, reference in prompts] == [rows[i]["completion"] for i in numbers]
    evaluate.refuse_unmatched(r"is (\d+)", prompts[:2], numbers[:2], source)
    with pytest.raises(DataError, match=rf"completion of {source}, line {bad + 1}, 'none'"):
        evaluate.refuse_unmatched(r"is (\d+)", prompts, numbers, source)
