"""How ranks find each other: a store that rank 0 or torchrun holds, who is on which host, and who is missing.

In: a :class:`~lora_one_dist.cluster.launchers.Launch`.  Out: the store and each rank's host; a :class:`Topology`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lora_one_dist.cluster.launchers import Launch, LaunchError

CONNECT_SECONDS, CONNECT_PAUSE_SECONDS = 5.0, 0.5  # for one attempt to reach rank 0, and until the next
READ_SECONDS = 5.0  # for the other ranks to read who is missing, before rank 0 ends


@dataclass(frozen=True)
class Topology:
    """Hosts and the groups for hierarchical traffic, as one rank sees them."""

    host_of: tuple[str, ...]
    """Host name of each rank."""
    host_ranks: tuple[int, ...]
    """Ranks of this rank's host, ascending."""
    inner: tuple[int, ...]
    """Ranks to exchange with first: the host's, or this rank alone where hosts have unequal numbers."""
    outer: tuple[int, ...]
    """Ranks to exchange with then: those at this rank's place in their own inner groups."""


def topology(host_of: tuple[str, ...], rank: int) -> Topology:
    """Who is where.  Pure.  ``host_of``: host name of each rank."""
    hosts = [tuple(r for r, host in enumerate(host_of) if host == name) for name in dict.fromkeys(host_of)]
    own = next(ranks for ranks in hosts if rank in ranks)
    if len({len(ranks) for ranks in hosts}) > 1:
        return Topology(host_of, own, (rank,), tuple(range(len(host_of))))
    place = own.index(rank)
    return Topology(host_of, own, own, tuple(ranks[place] for ranks in hosts))


def meet(launch: Launch, patience: timedelta, keys: str) -> tuple[dist.Store, tuple[str, ...]]:
    """Reach the store that rank 0 (or torchrun) holds and wait there for all.  Returns it and each rank's host."""
    deadline = time.monotonic() + patience.total_seconds()
    place, host = f"{launch.master_addr}:{launch.master_port}", socket.gethostname()
    try:
        found = socket.gethostbyname(launch.master_addr)
    except OSError as error:
        raise LaunchError(
            f"MASTER_ADDR = {launch.master_addr}: {host} cannot resolve it ({error}). Add it to its /etc/hosts, or "
            "give an address instead of a name."
        ) from None
    # Under torchrun the agent of the first host holds the store, not rank 0.
    holds = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = launch.master_addr, launch.master_port
    try:
        if not holds:
            _await_listener(address, port, deadline)
        store = dist.TCPStore(
            address, port, is_master=holds, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
    except (OSError, RuntimeError) as error:
        raise LaunchError(
            f"{host} cannot reach {place} (here {found}) in {patience.total_seconds():g} s: {_first_line(error)}. "
            "Check that the name means the same on every host, that no firewall stands between, and that the port is "
            "free on rank 0's host; tools/doctor.py looks at each."
        ) from None
    store.set(f"{keys}/{launch.rank}", host)
    if launch.rank == 0:
        _await_all(store, keys, launch.world_size, deadline)
    try:  # rank 0 takes until the deadline to find that somebody is missing
        store.wait([f"{keys}/all"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + 10))
        hosts: list[str | None] = json.loads(store.get(f"{keys}/all"))
        store.set(f"{keys}/{launch.rank}/read", "")
    except RuntimeError as error:
        raise LaunchError(f"{host} lost rank 0 at {place} while waiting for all: {_first_line(error)}.") from None
    missing = [str(rank) for rank, of in enumerate(hosts) if of is None]
    if missing:
        arrived = ", ".join(dict.fromkeys(of for of in hosts if of is not None))
        raise LaunchError(
            f"{len(missing)} of {launch.world_size} ranks have not come to {place} in {patience.total_seconds():g} s: "
            f"{', '.join(missing)}. Arrived from {arrived}. Look for their own messages; slow starts: raise "
            "comm.rendezvous_seconds."
        )
    return store, tuple(str(of) for of in hosts)


def _await_listener(address: str, port: int, deadline: float) -> None:
    """Return when somebody listens there.  Raises the last OSError at the deadline; torch would print pages."""
    while True:
        try:
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() + CONNECT_PAUSE_SECONDS > deadline:
                raise
        time.sleep(CONNECT_PAUSE_SECONDS)


def _await_all(store: dist.Store, keys: str, world_size: int, deadline: float) -> None:
    """On rank 0: publish the host names by rank, None for those that have not come at the deadline."""
    names = [f"{keys}/{rank}" for rank in range(world_size)]
    with contextlib.suppress(RuntimeError):
        store.wait(names, timedelta(seconds=max(1.0, deadline - time.monotonic())))
    hosts = [store.get(name).decode() if store.check([name]) else None for name in names]
    store.set(f"{keys}/all", json.dumps(hosts))
    if None in hosts:  # this rank will end, and the store with it: let the others read first
        readers = [f"{name}/read" for name, host in zip(names[1:], hosts[1:], strict=True) if host is not None]
        with contextlib.suppress(RuntimeError):
            store.wait(readers, timedelta(seconds=READ_SECONDS))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
