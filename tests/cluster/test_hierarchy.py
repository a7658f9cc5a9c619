"""Sums over hosts: their order, their bits and what each host exchanges."""

from __future__ import annotations

import pytest
import torch

from lora_one_dist.cluster import comm, hierarchy
from tests.ranks import run_ranks

FP32_ROUNDING = 2.0**-24
SHARE = 37  # of each rank: no power of two
# Hosts: each letter is a rank, and names its host.
# The order of the sums is the ranks', whatever the hosts, where a host has a run of 2^n ranks. Unequal hosts are flat.
SAME_BITS = ("aaaa", "aabb", "abcd", "aaab")
LAYOUTS = ("a", "aa", "ab", "aab", "abc", *SAME_BITS, "abab")


def addends(world_size: int) -> torch.Tensor:
    """(world_size, world_size * SHARE) fp32 of six orders of magnitude, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(0)
    shape = (world_size, world_size * SHARE)
    return torch.randn(shape, generator=generator) * 10 ** (6 * torch.rand(shape, generator=generator) - 3)


def assert_is_sum(found: torch.Tensor, rows: torch.Tensor) -> None:
    """Within the bound of a sum in a tree: a rounding of the sum of magnitudes on each level (Higham, 4.2)."""
    levels = (len(rows) - 1).bit_length()
    bound = levels * FP32_ROUNDING * rows.double().abs().sum(0)
    assert bool(((found.double() - rows.double().sum(0)).abs() <= bound).all())


@pytest.mark.parametrize("k", range(1, 10))
def test_tree_sum_adds_neighbours_first(k):
    rows = addends(9)[:k]
    found = hierarchy.tree_sum(rows.clone())
    assert_is_sum(found, rows)
    while len(rows) > 1:
        pairs = [rows[i] + rows[i + 1] for i in range(0, len(rows) - 1, 2)]
        rows = pairs + list(rows[len(pairs) * 2 :])
    assert torch.equal(found, rows[0])


def reduced_and_gathered():
    """Runs on a rank: its slot, its share of the sum (whole, and sent in small pieces), and the shares of all."""
    topology, size = comm._get_state().topology, comm.world_size()
    send = addends(size)[comm.rank()]
    before = send.clone()
    own = hierarchy.reduce_scatter(send)
    whole = torch.full((size * SHARE,), float("nan"))
    hierarchy.all_gather(whole, own.clone())
    exchange, exchanged = comm.dist.all_to_all_single, []
    comm.dist.all_to_all_single = lambda *args, **kwargs: (exchanged.append(args[1].numel()), exchange(*args, **kwargs))
    hierarchy.EXCHANGE_BYTES = 80
    piecewise = hierarchy.reduce_scatter(send)
    of_host = comm.sum_among(torch.tensor([10.0 ** comm.rank()]), "host").item()
    of_hosts = comm.sum_among(torch.tensor([10.0 ** comm.rank()]), "hosts").item()
    return {
        "slot": hierarchy.slot(),
        "own": own,
        "whole": whole,
        "piecewise": piecewise,
        "exchanged": exchanged,
        "sent is kept": torch.equal(send, before) and own.data_ptr() != send.data_ptr(),
        "sums": (of_host, of_hosts),
        "expected sums": tuple(float(sum(10.0**r for r in ranks)) for ranks in (topology.host_ranks, topology.outer)),
        "groups": [comm.shard_group(kind).size() for kind in ("world", "node")],
        "hosts": comm.num_hosts(),
    }


@pytest.fixture(scope="module")
def by_layout():
    return {hosts: run_ranks(len(hosts), reduced_and_gathered, hosts=hosts) for hosts in LAYOUTS}


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_sums_over_hosts_equal_a_naive_sum(hosts, by_layout):
    results, size = by_layout[hosts], len(hosts)
    rows = addends(size)
    assert sorted(found["slot"] for found in results) == list(range(size)), "a slot each"
    for rank, found in enumerate(results):
        slot = slice(found["slot"] * SHARE, (found["slot"] + 1) * SHARE)
        assert_is_sum(found["own"], rows[:, slot])
        assert torch.equal(found["whole"][slot], found["own"])
        assert torch.equal(found["whole"], results[0]["whole"]), "every rank's share lies at its slot"
        assert torch.equal(found["piecewise"], found["own"]), "the same bits in pieces"
        assert size == 1 or (len(found["exchanged"]) > 2 and max(found["exchanged"]) * 4 <= 80)
        assert found["sent is kept"], "and is not what is returned"
        assert found["sums"] == found["expected sums"]
        assert found["groups"] == [size, hosts.count(hosts[rank])]
        assert found["hosts"] == len(set(hosts))


def test_the_same_ranks_give_the_same_bits_on_one_host_and_on_many(by_layout):
    expected = hierarchy.tree_sum(addends(4))
    for hosts in SAME_BITS:
        for found in by_layout[hosts]:
            slot = slice(found["slot"] * SHARE, (found["slot"] + 1) * SHARE)
            assert torch.equal(found["own"], expected[slot]), hosts
    assert not torch.equal(addends(4).sum(0), expected), "in another order these sums do differ"
