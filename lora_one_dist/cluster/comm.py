"""The front of ``torch.distributed``, which this room alone talks to: start, collectives, agreement on errors.

In: the environment a launcher left (deepspeed, torchrun, srun, mpirun, or none at all).  Out: one default process
group over all ranks: NCCL for GPU tensors and gloo for host tensors, or gloo alone on CPUs.  One rank is a world of
size 1: the same calls, the same code.  Unless a docstring says otherwise a function here is collective: all ranks
must call it, in the same order.

What runs inside the hosts first, then between them, is in :mod:`hierarchy`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # public only as an argument at creation

from lora_one_dist.cluster import device as device_module
from lora_one_dist.cluster import hostfile
from lora_one_dist.cluster.launchers import Launch, LaunchError, address_towards, interface_of, resolve_launch
from lora_one_dist.cluster.meeting import Topology, meet, topology
from lora_one_dist.cluster.watch import Watch
from lora_one_dist.config.settings import CommConfig

EXIT_FAILED = 1
UNWATCHED = ("single process", "environment")  # launches without a launcher process to live and die with


class RankError(RuntimeError):
    """At least one rank failed; raised on every rank with the first failing rank's message."""


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
        LaunchError: if the launch environment is half set, deepspeed's hostfile is bad, or not all ranks arrive in
            time.
    """
    global _state
    settings = settings or CommConfig()
    launch = launch or resolve_launch(os.environ)
    if launch.source == "deepspeed":
        hostfile.refuse_bad_above()
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    patience = timedelta(seconds=settings.rendezvous_seconds)
    keys = f"lora_one_dist/{next(_meetings)}"
    store, host_of = meet(launch, patience, keys)
    spread = len(set(host_of)) > 1
    address = address_towards(launch.master_addr) if spread else "127.0.0.1"
    interface = interface_of(address) if spread else None
    if interface is not None:
        # gloo would take the address of the host's own name, which Debian maps to 127.0.1.1; NCCL, which meets over TCP
        # also where it then uses InfiniBand, the first interface that it finds.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    watch = _start_watch(launch, settings, store, keys, address)
    # torch 2.13 renames the collectives that torch 2.11 and DeepSpeed 0.19 know by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    _state = _State(launch, watch, topology(host_of, launch.rank), {})
    backend = device_module.pick(launch)  # from here on the failure of one rank ends all
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=patience)
    of_host = _state.topology.host_ranks
    for ranks in dict.fromkeys((of_host, _state.topology.inner, _state.topology.outer)):
        if len(ranks) < launch.world_size and (len(ranks) > 1 or ranks == of_host):
            _state.groups[ranks] = dist.new_group(list(ranks), timeout=patience, use_local_synchronization=True)
    if "nccl" in backend:
        device_module.connect({"the job": dist.group.WORLD, **{f"ranks {r}": g for r, g in _state.groups.items()}})
    set_timeout(settings.init_timeout_seconds)
    return launch


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
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # nothing of NCCL is under way any more
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
    return [row[0] for row in all_gather_rows([value])]


def all_gather_rows(values: Sequence[float]) -> list[tuple[float, ...]]:
    """Some floats from each rank, of each as many, in rank order."""
    gathered = [torch.empty(len(values), dtype=torch.float64) for _ in range(world_size())]
    dist.all_gather(gathered, torch.tensor(values, dtype=torch.float64))
    return [tuple(row.tolist()) for row in gathered]


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


def _get_state() -> _State:
    assert _state is not None, "comm.init first"
    return _state


def here() -> Topology:
    """Who is where, as this rank sees it.  Not collective."""
    return _get_state().topology


def group(ranks: tuple[int, ...]) -> Any:
    """The process group of a :class:`Topology`'s ranks.  Not collective."""
    return dist.group.WORLD if len(ranks) == world_size() else _get_state().groups[ranks]


def num_hosts() -> int:
    """Number of hosts.  Not collective."""
    return len(set(here().host_of))


def num_sharers(kind: str) -> int:
    """The most ranks that share one copy of the base: all (``world``) or a host's (``node``).  Not collective."""
    return world_size() if kind == "world" else max(Counter(here().host_of).values())


def shard_group(kind: str) -> Any:
    """The process group that shares one copy of the base: all ranks (``world``) or the host's (``node``).

    Not collective.  One rank a host: a group of one.
    """
    ranks = here().host_ranks
    if kind == "world" or len(ranks) == world_size():
        return dist.group.WORLD
    return group(ranks)


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
    topology = here()
    ranks = topology.host_ranks if kind == "host" else topology.outer
    if len(ranks) > 1:
        dist.all_reduce(tensor, group=group(ranks))
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
