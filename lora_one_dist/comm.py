"""The only user of ``torch.distributed``: launch environment, collectives, agreement on errors.

In: the environment a launcher left (deepspeed, torchrun, srun, mpirun, or none at all).  Out: one default process
group over all ranks: NCCL for GPU tensors and gloo for host tensors, or gloo alone on CPUs.  One rank is a world of
size 1: the same calls, the same code.  Unless a docstring says otherwise a function here is collective: all ranks
must call it, in the same order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Loading a 70B base or its SVDs can keep one rank busy for long between two collectives.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
SLURM_PORT_BASE, SLURM_PORT_RANGE = 20000, 10000


class LaunchError(RuntimeError):
    """The launch environment is half set, or contradicts itself."""


class RankError(RuntimeError):
    """At least one rank failed; raised on every rank with the first failing rank's message."""


@dataclass(frozen=True)
class Launch:
    """Who this process is among the others, and who said so."""

    source: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def resolve_launch(env: Mapping[str, str]) -> Launch:
    """Read rank, world size and rendezvous from the variables of whichever launcher started this process.

    Not collective, except under mpirun, where mpi4py is asked.

    Raises:
        LaunchError: if some but not all of a launcher's variables are set.
    """
    ranks_set = [name for name in LAUNCH_VARIABLES[:3] if name in env]
    if ranks_set:
        missing = [name for name in LAUNCH_VARIABLES if name not in env]
        if missing:
            raise LaunchError(
                f"{', '.join(ranks_set)} set but {', '.join(missing)} missing: the launch environment is half set. "
                f"Set all of {', '.join(LAUNCH_VARIABLES)}, or none and start with deepspeed, torchrun or srun."
            )
        values = {name: _integer(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        source = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed launcher or environment"
        return _checked(
            Launch(
                source,
                values["RANK"],
                values["WORLD_SIZE"],
                values["LOCAL_RANK"],
                env["MASTER_ADDR"],
                values["MASTER_PORT"],
            )
        )
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _checked(_launch_from_slurm(env))
    if "OMPI_COMM_WORLD_SIZE" in env or "PMI_SIZE" in env:
        return _checked(_launch_from_mpi(env))
    return Launch("single process", 0, 1, 0, "127.0.0.1", _free_port())


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name} = {env[name]!r}: must be a whole number. Unset it: launchers set it.") from None


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size or launch.local_rank < 0:
        raise LaunchError(
            f"rank {launch.rank}, local rank {launch.local_rank}, world size {launch.world_size} ({launch.source}): "
            "a rank must be in [0, world size). Check the launch command."
        )
    return launch


def _launch_from_slurm(env: Mapping[str, str]) -> Launch:
    missing = [name for name in ("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID") if name not in env]
    if missing:
        raise LaunchError(f"SLURM_PROCID set but {', '.join(missing)} missing. Start with srun inside sbatch.")
    address = env.get("MASTER_ADDR")
    if address is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        try:
            shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            address = shown.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise LaunchError(
                f"SLURM node list {nodes!r} cannot be expanded by scontrol. Set MASTER_ADDR yourself."
            ) from None
    # Two jobs may share a node: the port follows the job.
    port = SLURM_PORT_BASE + _integer(env, "SLURM_JOB_ID") % SLURM_PORT_RANGE
    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else port
    rank, size, local = (_integer(env, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    return Launch("srun", rank, size, local, address, port)


def _launch_from_mpi(env: Mapping[str, str]) -> Launch:
    from mpi4py import MPI  # needs an MPI library, which only mpirun's users have

    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else _free_port()
    world = MPI.COMM_WORLD
    hosts = world.allgather(MPI.Get_processor_name())
    local_rank = hosts[: world.rank].count(hosts[world.rank])
    rendezvous = None
    if world.rank == 0:
        rendezvous = (env.get("MASTER_ADDR", hosts[0]), port)
    address, port = world.bcast(rendezvous)
    return Launch("mpirun (mpi4py)", world.rank, world.size, local_rank, address, port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def init(launch: Launch | None = None) -> Launch:
    """Join the process group and pick this rank's device; sets the five launch variables for the libraries."""
    launch = launch or resolve_launch(os.environ)
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    backend = "gloo"
    if torch.cuda.is_available():
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            raise LaunchError("DS_ACCELERATOR = cpu, but torch sees GPUs. Hide them: CUDA_VISIBLE_DEVICES= (empty).")
        if launch.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {launch.local_rank} on {socket.gethostname()}: {torch.cuda.device_count()} GPUs visible. "
                "Start at most one rank per GPU, and let each see all of its host's (srun: --gpus-per-node, not "
                "--gpus-per-task)."
            )
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    # torch 2.13 renames the collectives that torch 2.11 and DeepSpeed 0.19 know by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return launch


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def reduce_to(tensor: torch.Tensor, owner: int) -> dist.Work:
    """Start to sum a tensor over ranks into ``owner``; elsewhere its content is undefined after ``wait()``."""
    return dist.reduce(tensor, dst=owner, async_op=True)


def broadcast(tensor: torch.Tensor, source: int) -> None:
    """Copy a tensor from ``source`` to all ranks, in place."""
    dist.broadcast(tensor, src=source)


def reduce_scatter(send: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of this rank's 1/world_size share of a flat tensor.  send (world_size * share,) -> (share,)."""
    own = torch.empty(send.numel() // world_size(), dtype=send.dtype, device=send.device)
    dist.reduce_scatter_tensor(own, send)
    return own


def all_gather(receive: torch.Tensor, own: torch.Tensor) -> None:
    """Fill ``receive`` (world_size * share,) with each rank's ``own`` (share,)."""
    dist.all_gather_into_tensor(receive, own)


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


def _summary(error: Exception) -> str:
    # Errors written for users say everything; for the others the type is part of the message.
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


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
