"""Who owns what: the balance that the docstrings promise, for any costs and any number of ranks."""

from __future__ import annotations

import random
from itertools import product

import pytest

from lora_one_dist.cluster.ownership import assign, split

COSTS = {
    "llama": [c for _ in range(32) for c in (16.8, 4.2, 4.2, 16.8, 45.1, 45.1, 45.1)],
    "equal": [1.0] * 10,
    "one giant": [100.0, *[1.0] * 9],
    "giant last": [*[1.0] * 9, 100.0],
    "single": [5.0],
    **{f"random {seed}": [random.Random(seed * 100 + i).uniform(0.1, 9) for i in range(23)] for seed in range(3)},
}
WORLD_SIZES = (1, 2, 3, 7, 64)


def loads(costs, owners, world_size):
    return [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world_size)]


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_owner_has_more_than_the_mean_plus_one_item(costs, world_size):
    owners = assign(costs, world_size)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(world_size))
    assert max(loads(costs, owners, world_size)) <= sum(costs) / world_size + max(costs) + 1e-9
    if world_size >= len(costs):
        assert len(set(owners)) == len(costs), "a rank each"
    else:
        assert set(owners) == set(range(world_size)), "no rank idles while another has two"


@pytest.mark.parametrize("seed", range(5))
def test_slowest_owner_is_within_a_third_of_the_best_possible(seed):
    costs = [random.Random(seed * 10 + i).choice([1.0, 2, 3, 5, 8]) for i in range(7)]
    best = min(max(loads(costs, owners, 3)) for owners in product(range(3), repeat=len(costs)))
    # Graham (1969): 4/3 - 1 / (3 p) for the costliest first; in the order given it would be 2 - 1 / p.
    assert max(loads(costs, assign(costs, 3), 3)) <= (4 / 3 - 1 / 9) * best + 1e-9


def test_costliest_item_comes_first():
    # In the order given, the 3 would come on top of a 1: 4 instead of 3.
    assert max(loads([1.0, 1.0, 1.0, 3.0], assign([1.0, 1.0, 1.0, 3.0], 2), 2)) == 3.0


def test_owners_of_equal_items_go_round_by_rank():
    # Every rank computes the map for itself: ties must not fall as a hash or a sort happens to.
    assert assign([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert assign([2.0, 1.0, 2.0], 2) == [0, 0, 1]
    assert assign([], 4) == []


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("groups", WORLD_SIZES)
def test_split_keeps_order_and_leaves_no_run_empty_or_heavy(costs, groups):
    runs = split(costs, groups)
    assert [item for run in runs for item in run] == list(range(len(costs)))
    assert 1 <= len(runs) <= groups
    assert all(runs)
    # A run's items have their middles inside its share of the total: half an item may stick out at each end.
    assert max(sum(costs[item] for item in run) for run in runs) <= sum(costs) / groups + max(costs) + 1e-9


def test_split_of_equal_items_is_even():
    assert split([1.0] * 6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert sorted(len(run) for run in split([1.0] * 10, 4)) == [2, 2, 3, 3]
    assert split([3.0, 1.0, 1.0, 1.0], 2) == [[0], [1, 2, 3]], "by cost, not by number"
    assert split([1.0, 1.0], 5) == [[0], [1]]
    assert split([], 3) == []
