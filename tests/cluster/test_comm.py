"""What the collectives do, and that no rank fails or waits alone."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from lora_one_dist.cluster import comm, hierarchy, launchers
from lora_one_dist.cluster.comm import RankError
from lora_one_dist.cluster.launchers import Launch
from lora_one_dist.data.errors import DataError
from tests.ranks import free_port, run_commands, run_ranks

# Collectives ----------------------------------------------------------------------------------------------------------


def collectives():
    """Runs on a rank: what each collective leaves here."""
    rank, found = comm.rank(), {}
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    found["same tensor"] = comm.all_sum(mine) is mine
    found["all_sum"] = mine.tolist()
    found["objects"] = comm.all_gather_object({"rank": rank})
    found["floats"] = comm.all_gather_floats(0.1 + rank)
    copied = torch.full((2,), float(rank))
    comm.broadcast(copied, 2)
    found["broadcast"] = copied.tolist()
    reduced = [torch.full((2, 2), float(rank + 1 + 10 * owner)) for owner in range(3)]
    works = [comm.reduce_to(tensor, owner) for owner, tensor in enumerate(reduced)]
    for work in works:
        work.wait()
    found["reduce_to"] = reduced[rank].tolist()
    found["reduce_scatter"] = hierarchy.reduce_scatter(torch.arange(6.0) * (rank + 1)).tolist()
    whole = torch.empty(6)
    hierarchy.all_gather(whole, torch.tensor([rank, rank + 0.5]))
    found["all_gather"] = whole.tolist()
    found["world"] = (rank, comm.world_size())
    return found


def test_collectives_at_three_ranks():
    results = run_ranks(3, collectives)
    for rank, found in enumerate(results):
        assert found["world"] == (rank, 3)
        assert found["same tensor"], "in place"
        assert found["all_sum"] == [6.0, 60.0]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["floats"] == [0.1, 1.1, 2.1], "not rounded to fp32"
        assert found["broadcast"] == [2.0, 2.0]
        assert found["reduce_to"] == [[6.0 + 30 * rank] * 2] * 2, "three under way at once, each summed on its owner"
        assert found["reduce_scatter"] == [6.0 * 2 * rank, 6.0 * (2 * rank + 1)]
        assert found["all_gather"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def alone(port):
    """Runs in a process that no launcher started."""
    for name in launchers.LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    launch = comm.init()
    own = torch.tensor([3.0, 4.0])
    comm.reduce_to(own, 0).wait()
    comm.broadcast(own, 0)
    whole = torch.empty(2)
    hierarchy.all_gather(whole, hierarchy.reduce_scatter(comm.all_sum(own)))
    with comm.local_first(), comm.all_or_none("nothing"):
        comm.barrier()
    variables = {name: os.environ[name] for name in launchers.LAUNCH_VARIABLES}
    comm.shutdown()
    comm.shutdown()
    again = comm.init(launch=Launch("test", 0, 1, 0, "127.0.0.1", port))
    return launch, variables, whole.tolist(), os.environ["MASTER_PORT"], again.source, comm.world_size()


def test_one_process_without_a_launcher_is_a_world_of_one():
    port = free_port()
    ((launch, variables, whole, new_port, source, size),) = run_ranks(1, alone, port, init=False)
    assert whole == [3.0, 4.0], "every collective is the identity"
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert variables == expected | {"MASTER_PORT": str(launch.master_port)}
    assert (new_port, source, size) == (str(port), "test", 1), "a given launch is taken, after a shutdown"


# Agreement ------------------------------------------------------------------------------------------------------------


def failing(failures):
    """Runs on a rank: messages and causes of blocks in which the ranks named by ``failures`` raise."""
    heard = []
    for errors in failures:
        ran_on = False
        try:
            with comm.all_or_none("reading x"):
                if comm.rank() in errors:
                    raise errors[comm.rank()]
            ran_on = True
        except RankError as error:
            heard.append((str(error), repr(error.__cause__)))
        else:
            heard.append(("ran on" if ran_on else "block ended", "None"))
    # Nobody is left behind in a collective.
    return heard, comm.all_sum(torch.ones(1)).item()


def test_failure_of_one_rank_is_raised_on_all_with_rank_host_and_cause():
    failures = [
        {1: ValueError("data.train: no rows")},
        {0: KeyError("column")},
        {},
        {0: RuntimeError("first"), 1: RuntimeError("second")},
        {1: ValueError()},
    ]
    (first, after_first), (second, after_second) = run_ranks(2, failing, failures)
    assert [message for message, _ in first] == [message for message, _ in second]
    host = socket.gethostname()
    assert [message for message, _ in first] == [
        f"rank 1 on {host} failed while reading x: data.train: no rows",
        f"rank 0 on {host} failed while reading x: KeyError: 'column'",
        "ran on",
        f"rank 0 on {host} failed while reading x: RuntimeError: first",
        f"rank 1 on {host} failed while reading x: ValueError: ",
    ]
    assert first[0][1] == "None"
    assert second[0][1] == "ValueError('data.train: no rows')", "the traceback stays where it happened"
    assert (first[3][1], second[3][1]) == ("RuntimeError('first')", "RuntimeError('second')")
    assert after_first == after_second == 2.0


def taking_turns(folder, local_ranks):
    """Runs on a rank: whether the first rank of its host had finished when this one entered the block."""
    local_rank = local_ranks[comm.rank()]
    os.environ["LOCAL_RANK"] = str(local_rank)
    host = sum(local == 0 for local in local_ranks[: comm.rank() + 1])
    marker = Path(folder) / f"host{host}"
    with comm.local_first():
        found = marker.exists()
        if local_rank == 0:
            time.sleep(0.3)  # what a rank that did not wait would overtake
            marker.touch()
    message = "no error"
    try:
        with comm.all_or_none("filling the cache"), comm.local_first():
            if local_rank == 0 and comm.rank() > 0:
                raise ValueError("disk full")
    except RankError as error:
        message = str(error)
    return found, message, comm.is_local_first()


def test_first_rank_of_each_host_goes_before_its_others(tmp_path):
    # Hosts of two ranks and of one: the third rank is first on its own host.
    results = run_ranks(3, taking_turns, str(tmp_path), [0, 1, 0])
    assert [found for found, _, _ in results] == [False, True, False]
    assert [first for _, _, first in results] == [True, False, True]
    assert all("rank 2 on" in message and message.endswith("disk full") for _, message, _ in results), "and none waits"


# Time-outs and ends ---------------------------------------------------------------------------------------------------


def waiting_for_a_missing_peer(seconds):
    """Runs on a rank: how long each collective waited for the last rank, and what it said; then the last one's part."""
    found = []
    last = comm.rank() == comm.world_size() - 1
    if last:
        time.sleep(2 * seconds)
    comm.barrier()  # under the long time-out of comm.init
    comm.set_timeout(seconds)
    if last:
        time.sleep(3 * seconds)
    else:
        # Rank 0 waits for all, rank 1 for its like on the other host, rank 2 for the rank beside it: each for rank 3.
        among = (None, "hosts", "host")[comm.rank()]
        started = time.monotonic()
        try:
            comm.sum_among(torch.ones(1), among) if among else comm.barrier()
        except RuntimeError as error:
            found.append((time.monotonic() - started, comm._is_symptom(error)))
    comm._get_state().watch.leave()  # no barrier ends these groups
    comm.shutdown = lambda: None
    return found


def test_collective_fails_after_its_own_time_and_no_sooner():
    seconds = 0.4
    *waited, _ = run_ranks(4, waiting_for_a_missing_peer, seconds, hosts="aabb")
    for found in waited:
        ((took, symptom),) = found
        assert seconds * 0.9 <= took <= seconds * 2.5, "rank 3 ends after three times as long"
        assert symptom, "and the failure of another rank would explain it"


def failing_alone(fault):
    """Runs on a rank: rank 1 fails while the others wait for it in a collective."""
    if comm.rank() == 1 and fault == "ours":
        raise DataError("data.train: no rows")
    if comm.rank() == 1 and fault == "foreign":
        raise RuntimeError("boom")
    if fault.startswith("agreed"):
        headline = comm._headline
        if comm.rank() == 1:  # all learn of it at the same moment: the one that has the traceback is the slowest
            comm._headline = lambda error: (time.sleep(0.3), headline(error))[1]
        with comm.all_or_none("reading x"):
            if comm.rank() == 1:
                raise DataError("no rows") if fault == "agreed, ours" else OSError("stale file handle")
    if comm.rank() == 1 and fault == "killed":
        time.sleep(0.2)  # the others are in the collective: gloo sees the end too
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()


@pytest.mark.parametrize(
    ("fault", "line", "traceback", "told_by"),
    [
        ("ours", "data.train: no rows", False, [0, 1]),
        ("foreign", "RuntimeError: boom", True, [0, 1]),
        ("agreed, ours", "failed while reading x: no rows", False, [0, 1]),
        ("agreed, foreign", "failed while reading x: OSError: stale file handle", True, [0, 1]),
        ("killed", "its process ended without a word (killed? the", False, [0]),
    ],
)
def test_failure_is_told_by_its_rank_and_by_rank_0(fault, line, traceback, told_by, tmp_path):
    ends = run_commands(tmp_path, 3, failing_alone, fault, hosts="abc")
    assert [code for code, _ in ends] == [1, -signal.SIGKILL if fault == "killed" else 1, 1]
    told = [(rank, text.splitlines()) for rank, (_, text) in enumerate(ends) if text]
    assert [rank for rank, _ in told] == told_by
    for rank, lines in told:
        assert lines[0].startswith("rank 1 on b failed")
        assert line in lines[0], "first, and not the gloo error that it caused"
        assert any("Traceback" in text for text in lines) == (traceback and rank == 1)
        assert rank == 1 or len(lines) == 1


def losing_rank_0():
    """Runs on a rank: rank 0 ends while the others wait for it in a collective."""
    if comm.rank() == 0:
        time.sleep(0.2)
        os._exit(0)  # which a launcher takes for success
    comm.barrier()


@pytest.mark.parametrize(("hosts", "told_by"), [("aaa", [1]), ("aab", [1, 2])])
def test_loss_of_rank_0_is_told_once_on_each_host(hosts, told_by, tmp_path):
    ends = run_commands(tmp_path, 3, losing_rank_0, hosts=hosts)
    assert [code for code, _ in ends] == [0, 1, 1]
    assert [rank for rank, (_, text) in enumerate(ends) if text] == told_by
    for rank in told_by:
        assert ends[rank][1].startswith("rank 0 on a failed: its process ended without a word")
        assert ends[rank][1].endswith(f"seen from rank {rank} on {hosts[rank]}\n")
