"""Samples to batches: every order, deal and padding against one written out by hand."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from lora_one_dist.data.batches import collate, deal, epoch_order, global_batch, steps_per_epoch
from lora_one_dist.data.samples import tokenize
from tests.data.helpers import config, dataset


def test_epoch_order_is_a_permutation_of_its_arguments_alone():
    torch.manual_seed(1)
    order = epoch_order(1000, seed=3, epoch=0).clone()
    epoch_order.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=0))
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(1000))
    others = [epoch_order(1000, 3, 1), epoch_order(1000, 4, 0), torch.arange(1000)]
    assert all((order == other).sum() < 20 for other in others), "1000 random positions agree in about one"
    assert epoch_order(8, 0, 0).tolist() == [5, 4, 7, 2, 3, 0, 6, 1], "old runs can no longer be resumed or repeated"


def test_global_batches_cover_each_epoch_exactly():
    assert [steps_per_epoch(n, 4) for n in (1, 4, 5, 10)] == [1, 1, 2, 3]
    batches = [global_batch(10, 4, step, seed=5) for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert [*chain(*batches[:3])] == epoch_order(10, 5, 0).tolist()
    assert [*chain(*batches[3:])] == epoch_order(10, 5, 1).tolist()
    assert global_batch(10, 4, 4, seed=5) == batches[4], "a resumed run asks for a later step first"
    assert global_batch(3, 8, 1, seed=0) == epoch_order(3, 0, 1).tolist()


def test_deal_by_hand():
    assert [deal(7, 2, 3, rank) for rank in range(3)] == [[[0, 1], [6]], [[2, 3], []], [[4, 5], []]]
    assert [deal(1, 4, 2, rank) for rank in range(2)] == [[[0]], [[]]]
    assert deal(0, 4, 2, 0) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_deal_gives_every_sample_once_and_every_rank_as_many(world_size):
    for num_samples in range(1, 23):
        for size in (1, 2, 3, 8):
            hands = [deal(num_samples, size, world_size, rank) for rank in range(world_size)]
            assert len({len(hand) for hand in hands}) == 1
            rounds = [hand[k] for k in range(len(hands[0])) for hand in hands]
            assert [*chain(*rounds)] == list(range(num_samples)), "the order of samples does not depend on the world"
            assert all(len(micro) in (0, size) for micro in rounds if micro[-1:] != [num_samples - 1])
            assert any(hands[0][-1:]), "no round in which all are idle"


def test_collate_pads_on_the_right():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "num_targets": 2}, {"input_ids": [8], "labels": [8]}]
    batch = collate(samples, pad_token_id=9)
    expected = {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())
    weightless = collate(samples, pad_token_id=9, weightless=True)
    assert weightless["labels"].tolist() == [[-100, -100]]
    assert weightless["input_ids"].tolist() == [[5, 6]], "two tokens: enough to join the collectives"
    assert weightless["attention_mask"].tolist() == [[1, 1]]


def test_collate_takes_rows_of_the_data(tokenizer):
    data = tokenize(dataset({"prompt": "q", "completion": "r"}), tokenizer, config())
    batch = collate([data.dataset[0], data.dataset[0]], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"][0, :2].tolist() == [-100, -100]
