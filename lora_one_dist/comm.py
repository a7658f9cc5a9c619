"""The only user of ``torch.distributed``: launch environment, collectives, agreement on errors.

In: the environment a launcher left (deepspeed, torchrun, srun, mpirun, or none at all).  Out: one default process
group over all ranks: NCCL for GPU tensors and gloo for host tensors, or gloo alone on CPUs.  One rank is a world of
size 1: the same calls, the same code.  Unless a docstring says otherwise a function here is collective: all ranks
must call it, in the same order.

Adapters' traffic is hierarchical, inside the host first (:func:`reduce_scatter`, :func:`all_gather`): of S bytes, each
host sends S (H - 1) / H to the others and receives as much, on H hosts with L ranks each, where a ring over all W = H L
ranks sends S (W - 1) / W.  The order of its sums is fixed (a balanced tree over the ranks), so that the same ranks give
the same bits on one host or many, as long as L is a power of two.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # public only as an argument at creation

from lora_one_dist.config import CommConfig
from lora_one_dist.launchers import Launch, LaunchError, address_towards, interface_of, resolve_launch
from lora_one_dist.watch import Watch

EXIT_FAILED = 1
EXCHANGE_BYTES = 64 * 2**20  # of a reduce-scatter sent at a time: bounds what is received beside the whole
CONNECT_SECONDS, CONNECT_PAUSE_SECONDS = 5.0, 0.5  # for one attempt to reach rank 0, and until the next
READ_SECONDS = 5.0  # for the other ranks to read who is missing, before rank 0 ends
UNWATCHED = ("single process", "environment")  # launches without a launcher process to live and die with


class RankError(RuntimeError):
    """At least one rank failed; raised on every rank with the first failing rank's message."""


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


@dataclass
class _State:
    launch: Launch
    watch: Watch
    topology: Topology
    groups: dict[tuple[int, ...], Any]


_state: _State | None = None
_meetings = count()  # a store may outlive its process group: keys of each meeting are its own


def init(settings: CommConfig | None = None, launch: Launch | None = None) -> Launch:
    """Meet the other ranks, watch them, join the process group and pick this rank's device.

    Sets the five launch variables for the libraries.

    Raises:
        LaunchError: if the launch environment is half set, or not all ranks arrive in time.
    """
    global _state
    settings = settings or CommConfig()
    launch = launch or resolve_launch(os.environ)
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    patience = timedelta(seconds=settings.rendezvous_seconds)
    keys = f"lora_one_dist/{next(_meetings)}"
    store, host_of = _meet(launch, patience, keys)
    spread = len(set(host_of)) > 1
    address = address_towards(launch.master_addr) if spread else "127.0.0.1"
    if spread and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo would take the address of the host's own name, which Debian maps to 127.0.1.1.
        interface = interface_of(address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    watch = _start_watch(launch, settings, store, keys, address)
    # torch 2.13 renames the collectives that torch 2.11 and DeepSpeed 0.19 know by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _state = _State(launch, watch, topology(host_of, launch.rank), {})
    backend = _pick_device(launch)  # from here on the failure of one rank ends all
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=patience)
    of_host = _state.topology.host_ranks
    for ranks in dict.fromkeys((of_host, _state.topology.inner, _state.topology.outer)):
        if len(ranks) < launch.world_size and (len(ranks) > 1 or ranks == of_host):
            _state.groups[ranks] = dist.new_group(list(ranks), timeout=patience, use_local_synchronization=True)
    set_timeout(settings.init_timeout_seconds)
    return launch


def _pick_device(launch: Launch) -> str:
    """Set this rank's GPU, if there are any.  Returns the backend."""
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise LaunchError(f"DS_ACCELERATOR = {accelerator!r}: must be cuda or cpu. Unset it: torch tells which.")
    if not torch.cuda.is_available():
        if accelerator == "cuda":
            raise LaunchError("DS_ACCELERATOR = cuda: torch sees no GPU here. Unset it, or look at nvidia-smi.")
        return "gloo"
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        raise LaunchError("DS_ACCELERATOR = cpu, but torch sees GPUs. Hide them: CUDA_VISIBLE_DEVICES= (empty).")
    if launch.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {launch.local_rank} on {socket.gethostname()}: {torch.cuda.device_count()} GPUs visible. "
            "Start at most one rank per GPU, and let each see all of its host's (srun: --gpus-per-node, not "
            "--gpus-per-task)."
        )
    torch.cuda.set_device(launch.local_rank)
    return "cpu:gloo,cuda:nccl"


def _meet(launch: Launch, patience: timedelta, keys: str) -> tuple[dist.Store, tuple[str, ...]]:
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


def _start_watch(launch: Launch, settings: CommConfig, store: dist.Store, keys: str, address: str) -> Watch:
    launched = launch.source not in UNWATCHED
    watch = Watch(launch.rank, socket.gethostname(), settings.lost_after_seconds, launched, _end)
    if launch.rank == 0:
        store.set(f"{keys}/watch", json.dumps(watch.listen(address)))
    else:
        hub = json.loads(store.get(f"{keys}/watch"))
        try:
            watch.connect(**hub)
        except OSError as error:
            raise LaunchError(
                f"{watch.host} cannot reach rank 0 on {hub['host']} at {hub['address']} port {hub['port']}: {error}. "
                "Ranks connect to each other on free ports: let no firewall stand between the hosts, and choose the "
                "network by the master address."
            ) from None
    watch.start()
    return watch


def set_timeout(seconds: float) -> None:
    """Time-out of this rank's collectives from now on.  Not collective."""
    for group in (None, *(_state.groups.values() if _state else ())):
        _set_pg_timeout(timedelta(seconds=seconds), group)


def accept_stop() -> None:
    """From now on SIGTERM, like SIGUSR1, asks for a stop instead of ending the job.  Not collective."""
    _get_state().watch.accepts_stop = True


def stop_asked() -> bool:
    """Has a signal asked this rank to stop?  Not collective: the ranks must agree before they act on it."""
    return _get_state().watch.stop_asked


def shutdown() -> None:
    """Leave the process group, all together."""
    global _state
    if _state is not None:
        barrier()
        _state.watch.leave()
        dist.destroy_process_group()
        _state = None


def fail(error: BaseException) -> NoReturn:
    """End this process after an error, and the job with it.  Not collective.

    The first line on standard error names rank, host and cause of the job's first failure.
    """
    own = _headline(error)
    failure = own
    if _state is not None:
        failure = _state.watch.report(own, symptom=_is_symptom(error))
    # Every rank raises the same RankError, with a cause on the one that failed.
    mine = failure == own and (error.__cause__ is not None or not isinstance(error, RankError))
    if mine or _speaks(failure):
        print(failure, file=sys.stderr)
    raised = [e for e in (error, error.__cause__) if e is not None]
    # Ours say everything in their message; of the others one wants to know where.
    if mine and not all(type(e).__module__.startswith("lora_one_dist") for e in raised):
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(EXIT_FAILED)  # peers may be inside a collective with this rank: no teardown would end


def _headline(error: BaseException) -> str:
    if isinstance(error, RankError):
        return str(error)  # every rank has the same, and it names the one that failed
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} failed: {_summary(error)}"


def _is_symptom(error: BaseException) -> bool:
    """Does a collective complain of its peers, or all of one?  gloo's errors have no type of their own."""
    if isinstance(error, RankError):
        return error.__cause__ is None  # the rank that has the cause tells it, with its traceback
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _speaks(failure: str) -> bool:
    """Who tells a failure that this rank did not raise: the rank it names, and rank 0, or each host's first without."""
    if _state is None:
        return True
    own, first_left = _state.launch.rank, min((r for r in _state.topology.host_ranks if r > 0), default=None)
    return own == 0 or failure.startswith(f"rank {own} ") or (_state.watch.alone and own == first_left)


def _end(failure: str, exit_code: int) -> NoReturn:
    """What the watch calls when the job failed while this rank's main thread was elsewhere."""
    if _speaks(failure):
        print(failure, file=sys.stderr, flush=True)
    os._exit(exit_code)


def launch() -> Launch:
    """How this process was started.  Not collective."""
    return _get_state().launch


def rank() -> int:
    """This rank in [0, world_size).  Not collective."""
    return dist.get_rank()


def world_size() -> int:
    """Number of ranks.  Not collective."""
    return dist.get_world_size()


def is_local_first() -> bool:
    """Is this the first rank of its host?  Not collective."""
    return int(os.environ["LOCAL_RANK"]) == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU.  Not collective."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    all_sum(torch.zeros(1))


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns the tensor."""
    dist.all_reduce(tensor)
    return tensor


def all_gather_object(value: Any) -> list[Any]:
    """One small Python value from each rank, in rank order."""
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_floats(value: float) -> list[float]:
    """One float from each rank, in rank order."""
    gathered = torch.zeros(world_size(), dtype=torch.float64)
    gathered[rank()] = value
    return all_sum(gathered).tolist()


def reduce_to(tensor: torch.Tensor, owner: int) -> Waitable:
    """Start to sum a tensor over ranks into ``owner``; elsewhere its content is undefined after ``wait()``."""
    return dist.reduce(tensor, dst=owner, async_op=True) if world_size() > 1 else _Done()


class Waitable(Protocol):
    """Something under way."""

    def wait(self) -> Any: ...


class _Done:
    """Of one rank alone, for which gloo would copy the tensor."""

    def wait(self) -> None:
        pass


def broadcast(tensor: torch.Tensor, source: int) -> None:
    """Copy a tensor from ``source`` to all ranks, in place."""
    dist.broadcast(tensor, src=source)


def slot() -> int:
    """This rank's place in flat tensors of :func:`reduce_scatter` and :func:`all_gather`.  Not collective.

    Ranks at the same place of their hosts lie side by side, so that what a host keeps for itself is contiguous.
    """
    topology = _get_state().topology
    return topology.inner.index(rank()) * len(topology.outer) + topology.outer.index(rank())


def reduce_scatter(send: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of the share at this rank's slot.  send (world_size * share,) -> (share,), a copy.

    Inside the host first, then between the ranks at the same place of their hosts.  Sums are in a fixed order.
    """
    topology = _get_state().topology
    own = _exchange_and_sum(_exchange_and_sum(send, topology.inner), topology.outer)
    return own.clone() if own is send else own


def _exchange_and_sum(send: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Sum over ``ranks`` of this rank's part of ``send``.  (len(ranks) * part,) -> (part,)."""
    if len(ranks) == 1:
        return send
    parts = send.view(len(ranks), -1)
    own = torch.empty_like(parts[0])
    step = max(1, EXCHANGE_BYTES // (len(ranks) * send.element_size()))
    for columns, result in zip(parts.split(step, dim=1), own.split(step), strict=True):
        received = torch.empty_like(columns, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, columns.contiguous(), group=_group(ranks))
        result.copy_(tree_sum(received))
    return own


def tree_sum(rows: torch.Tensor) -> torch.Tensor:
    """Sum of (k, n) over its rows, neighbours first: (0 + 1) + (2 + 3).  Pure; the order depends on k alone."""
    while len(rows) > 1:
        paired = rows[: len(rows) // 2 * 2]
        rows = torch.cat([paired[0::2] + paired[1::2], rows[len(paired) :]])
    return rows[0]


def all_gather(receive: torch.Tensor, own: torch.Tensor) -> None:
    """Fill ``receive`` (world_size * share,), by slot, with each rank's ``own`` (share,).  Between the hosts first."""
    topology = _get_state().topology
    if len(topology.inner) == 1:
        _all_gather(receive, own, topology.outer)
        return
    of_place = own
    if len(topology.outer) > 1:
        of_place = torch.empty(len(topology.outer) * own.numel(), dtype=own.dtype, device=own.device)
        _all_gather(of_place, own, topology.outer)
    _all_gather(receive, of_place, topology.inner)


def _all_gather(receive: torch.Tensor, own: torch.Tensor, ranks: tuple[int, ...]) -> None:
    dist.all_gather_into_tensor(receive, own, group=_group(ranks))


def _get_state() -> _State:
    assert _state is not None, "comm.init first"
    return _state


def _group(ranks: tuple[int, ...]) -> Any:
    return dist.group.WORLD if len(ranks) == world_size() else _get_state().groups[ranks]


def num_hosts() -> int:
    """Number of hosts.  Not collective."""
    return len(set(_get_state().topology.host_of))


def num_sharers(kind: str) -> int:
    """The most ranks that share one copy of the base: all (``world``) or a host's (``node``).  Not collective."""
    return world_size() if kind == "world" else max(Counter(_get_state().topology.host_of).values())


def shard_group(kind: str) -> Any:
    """The process group that shares one copy of the base: all ranks (``world``) or the host's (``node``).

    Not collective.  One rank a host: a group of one.
    """
    ranks = _get_state().topology.host_ranks
    if kind == "world" or len(ranks) == world_size():
        return dist.group.WORLD
    return _group(ranks)


@contextlib.contextmanager
def all_or_none(doing: str) -> Iterator[None]:
    """Run a block without collectives on every rank; if it raises on one, raise on all.

    Raises:
        RankError: on every rank, naming rank, host and cause of the first failure.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it was, the peers must learn of it before they enter a collective
        failure = error
    report = None if failure is None else f"{socket.gethostname()} failed while {doing}: {_summary(failure)}"
    reports = all_gather_object(report)
    for failed_rank, message in enumerate(reports):
        if message is not None:
            raise RankError(f"rank {failed_rank} on {message}") from failure


def _summary(error: BaseException) -> str:
    # Errors written for users say everything; for the others the type is part of the message.
    return (
        str(error) if isinstance(error, ValueError | LaunchError) and str(error) else f"{type(error).__name__}: {error}"
    )


@contextlib.contextmanager
def local_first() -> Iterator[None]:
    """First rank of each host runs the block before its other ranks do (they find its cache)."""
    if not is_local_first():
        barrier()
    try:
        yield
    finally:
        if is_local_first():
            barrier()


def sum_among(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Sum in place over the ranks of this host (``host``), or over those at this rank's place of each host (``hosts``).

    Collective among those ranks; ``hosts`` is all ranks where hosts have unequal numbers.  Returns the tensor.
    """
    topology = _get_state().topology
    ranks = topology.host_ranks if kind == "host" else topology.outer
    if len(ranks) > 1:
        dist.all_reduce(tensor, group=_group(ranks))
    return tensor


def send_receive(send: torch.Tensor, peer: int) -> torch.Tensor:
    """Swap a tensor with rank ``peer``, both ways at once.  Returns what the peer sent, of the same shape and type.

    Called by the two alone; with GPU tensors only after some collective of all ranks, where NCCL connects them.
    """
    received = torch.empty_like(send)
    swap = [dist.P2POp(dist.isend, send, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(swap):
        work.wait()
    return received
