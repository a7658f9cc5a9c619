"""Under a launcher: the ranks gather their facts, meet as training does, and measure clock and bandwidth."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from lora_one_dist.commands.doctor.facts import Row, counted, facts, resolve
from lora_one_dist.commands.doctor.findings import by_value, many, report

CLOCK_ROUNDS = 5
REPEATS = 7


def among_ranks(request: Row, launch: Any, seconds: float, megabytes: float | None) -> int:
    """Gather, judge and say the facts of all ranks, then their bandwidths.  Returns the exit code.  Collective."""
    from lora_one_dist.cluster import comm
    from lora_one_dist.cluster.launchers import address_towards, interface_of
    from lora_one_dist.config.settings import CommConfig

    own = {"rank": launch.rank} | facts(**request) | {"CUDA": seen_by_torch()}  # who hangs here never arrives
    comm.init(CommConfig(rendezvous_seconds=seconds, init_timeout_seconds=max(30.0, seconds)), launch)
    say: Callable[[str], None] = print if comm.rank() == 0 else lambda _: None
    address = address_towards(launch.master_addr)
    hosts = list(dict.fromkeys(comm.all_gather_object(own["host"])))
    own |= {"address": address, "interface": interface_of(address), "clock s": clock_offset(), "names": resolve(hosts)}
    rows = comm.all_gather_object(own)
    job, kind = f"{many(len(rows), 'rank')} on {many(len(hosts), 'host')}", comm.device().type
    say(f"{job}, {kind}, launched by {launch.source}")
    faults = report(say, rows)
    size = megabytes if megabytes is not None else 64.0 if kind == "cuda" else 16.0
    if len(rows) > 1 and size > 0:
        say(f"\nbandwidth, median of {REPEATS} with {size:g} MiB (if it stops here, NCCL_DEBUG=INFO says more)")
        places = [[row["rank"] for row in of] for of in by_value(rows, "host").values()]
        speeds = comm.all_gather_object(own_bandwidth(places, size))
        faults += report(say, [speeds[ranks[0]] for ranks in places])
    say("\n" + (many(len(faults), "fault") if faults else f"all {job} agree"))
    comm.shutdown()  # nobody leaves before rank 0 has said all
    return int(bool(faults))


def seen_by_torch() -> str:
    """What torch was built for and the GPUs that it sees; '-' if it sees none."""
    import torch

    if not torch.cuda.is_available():
        return "-"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = counted([f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices])
    return f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, {names}"


def clock_offset() -> float:
    """Seconds this clock is ahead of rank 0's, in the round where all looked most nearly at once.  Collective."""
    from lora_one_dist.cluster import comm

    looks = []
    for _ in range(CLOCK_ROUNDS):
        comm.barrier()
        looks.append(comm.all_gather_floats(time.time()))
    closest = min(looks, key=lambda times: max(times) - min(times))
    return round(closest[comm.rank()] - closest[0], 2)


def own_bandwidth(hosts: Sequence[Sequence[int]], megabytes: float) -> Row:
    """GB/s of all-reduces inside this host and between hosts, and with the neighbours on a ring of hosts.  Collective.

    ``hosts``: ranks of each.  An all-reduce of S bytes over n ranks in t seconds counts as 2 (n - 1) / n S / t: what
    crosses each rank's link.
    """
    import torch

    from lora_one_dist.cluster import comm

    own, firsts = comm.rank(), [ranks[0] for ranks in hosts]
    tensor = torch.zeros(int(megabytes * 2**20) // 4, device=comm.device())
    comm.all_sum(torch.zeros(1, device=comm.device()))  # NCCL connects all ranks before two talk alone
    found: Row = {"host": socket.gethostname()}
    inside = next(len(ranks) for ranks in hosts if own in ranks)
    if inside > 1:
        found["inside GB/s"] = 2 * (inside - 1) / inside * rate(tensor, partial(comm.sum_among, tensor, "host"))
    comm.barrier()
    if own in firsts and len(hosts) > 1 and len({len(ranks) for ranks in hosts}) == 1:
        across = len(hosts)
        found["between GB/s"] = 2 * (across - 1) / across * rate(tensor, partial(comm.sum_among, tensor, "hosts"))
    for pairs in rounds(firsts):
        comm.barrier()
        for peer in [a + b - own for a, b in pairs if own in (a, b)]:
            with_peer = rate(tensor, partial(comm.send_receive, tensor, peer))
            # Of its two links the better: the other may be slow for its neighbour's sake.
            found["link GB/s"] = max(found.get("link GB/s", 0.0), with_peer)
    return found


def rounds(ring: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring, in rounds where each has at most one partner.  Pure."""
    pairs = list(zip(ring, [*ring[1:], *ring[:1]], strict=True))
    if len(ring) < 3:
        return [pairs[:-1]]
    last = [[pairs.pop()]] if len(ring) % 2 else []
    return [pairs[0::2], pairs[1::2], *last]


def rate(tensor: Any, send: Callable[[], Any]) -> float:
    """GB/s at which ``send`` goes through with this tensor, and returns one.

    The median of some: the best of them falls where other pairs pause, which differs from host to host.
    """
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        float(send()[0])  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return tensor.nbytes / median(seconds[1:]) / 1e9
