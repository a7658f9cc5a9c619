"""How ranks meet: who is beside whom, and who did not come.  Of hosts, each letter is a rank and names its host."""

from __future__ import annotations

import os
import time

import pytest

from lora_one_dist.cluster import comm, meeting
from lora_one_dist.cluster.launchers import Launch, LaunchError
from lora_one_dist.config.settings import CommConfig
from tests.ranks import free_port, run_ranks


@pytest.mark.parametrize(
    ("hosts", "inner", "outer"),
    [
        ("a", ["0"], ["0"]),
        ("aaa", ["012"] * 3, ["0", "1", "2"]),
        ("abcd", ["0", "1", "2", "3"], ["0123"] * 4),
        ("aabb", ["01", "01", "23", "23"], ["02", "13", "02", "13"]),
        ("abab", ["02", "13", "02", "13"], ["01", "01", "23", "23"]),
        ("abababab", ["0246", "1357"] * 4, ["01", "01", "23", "23", "45", "45", "67", "67"]),
        ("aaab", ["0", "1", "2", "3"], ["0123"] * 4),
    ],
)
def test_topology(hosts, inner, outer):
    for rank, host in enumerate(hosts):
        found = meeting.topology(tuple(hosts), rank)
        assert found.host_of == tuple(hosts)
        assert found.host_ranks == tuple(r for r, name in enumerate(hosts) if name == host)
        assert ("".join(map(str, found.inner)), "".join(map(str, found.outer))) == (inner[rank], outer[rank])


def met(settings, missing=(), launch=None):
    """Runs on a rank: the error of the meeting, and how long it took; some ranks do not come."""
    started = time.monotonic()
    if int(os.environ["RANK"]) in missing:
        return None
    try:
        comm.init(settings, launch)
    except LaunchError as error:
        return str(error), time.monotonic() - started
    return "met"


def test_missing_ranks_are_named_on_every_rank_that_came():
    settings = CommConfig.model_construct(rendezvous_seconds=2.0)  # below what a config may say, to be fast
    found = run_ranks(4, met, settings, (1, 2), init=False, hosts="abcd")
    assert found[1:3] == [None, None]
    for message, seconds in (found[0], found[3]):
        assert "2 of 4 ranks have not come to 127.0.0.1:" in message
        assert "in 2 s: 1, 2. Arrived from a, d. Look for their own messages" in message
        assert seconds <= 10
    assert found[0][1] >= 1.9, "rank 0 waits for that long; rank 3 came a little later"


def test_master_address_that_means_nothing_here_is_named():
    launch = Launch("test", 1, 2, 0, "no such host", free_port())
    ((message, _),) = run_ranks(1, met, None, (), launch, init=False, hosts="a")
    assert message.startswith("MASTER_ADDR = no such host: a cannot resolve it (")
    assert "Add it to its /etc/hosts, or give an address" in message
