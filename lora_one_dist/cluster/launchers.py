"""Which launcher started this process, and who it is among the others.

In: environment variables, and under mpirun what mpi4py answers.  Out: a :class:`Launch`.  All launchers end here; a
half-set environment is an error, never a guess.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_PORT_BASE, SLURM_PORT_RANGE = 20000, 10000
PORTS = 2**16


class LaunchError(RuntimeError):
    """The launch environment is half set or contradicts itself, or the ranks cannot meet."""


@dataclass(frozen=True)
class Launch:
    """Who this process is among the others, and who said so."""

    source: str
    """deepspeed, torchrun, srun, mpirun (mpi4py), environment, or single process."""
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
        source = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_SIZE" in env else "environment"
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
    if "OMPI_COMM_WORLD_SIZE" in env:  # also inside a step of SLURM, whose variables the ranks inherit
        return _checked(_launch_from_mpi(env))
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _checked(_launch_from_slurm(env))
    if "PMI_SIZE" in env:  # after SLURM's: srun may set it too
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
    if not launch.master_addr.strip() or not 0 < launch.master_port < PORTS:
        raise LaunchError(
            f"MASTER_ADDR = {launch.master_addr!r}, MASTER_PORT = {launch.master_port} ({launch.source}): must be a "
            f"host and a port from 1 to {PORTS - 1}. Set both, or neither and let the launcher do it."
        )
    return launch


def _launch_from_slurm(env: Mapping[str, str]) -> Launch:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    missing = [name for name in (tasks, "SLURM_LOCALID", "SLURM_JOB_ID") if name not in env]
    if missing:
        raise LaunchError(f"SLURM_PROCID set but {', '.join(missing)} missing. Start with srun inside sbatch.")
    size = _integer(env, tasks)
    _refuse_interactive(env, size)
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
    return Launch("srun", _integer(env, "SLURM_PROCID"), size, _integer(env, "SLURM_LOCALID"), address, port)


def _refuse_interactive(env: Mapping[str, str], step_tasks: int) -> None:
    """Raise LaunchError in a shell of SLURM that is one task among several: nothing has started the others.

    The shell of ``salloc`` (an interactive step) is a step of one task that keeps the allocation's SLURM_NTASKS; that
    of ``srun --ntasks 4 --pty bash`` is the first of 4 tasks, the other shells have ended for want of input.
    """
    tasks = _integer(env, "SLURM_NTASKS") if "SLURM_NTASKS" in env else step_tasks
    by_salloc = step_tasks == 1 < tasks
    if by_salloc or (step_tasks > 1 and "SLURM_PTY_PORT" in env and _typed_into_a_shell()):
        overlap = "" if by_salloc else "--overlap "
        raise LaunchError(
            f"SLURM_STEP_NUM_TASKS = {step_tasks}, SLURM_NTASKS = {tasks}: this is an interactive shell of SLURM, in "
            f"which nobody has started the other ranks. Start all of them by srun --ntasks {tasks} {overlap}"
            f"--kill-on-bad-exit=1 {shlex.join(sys.orig_argv)}; or this process alone, with --ntasks 1."
        )


def _typed_into_a_shell() -> bool:
    """Was this process started at a prompt?  Shells give what is typed a process group of its own; SLURM does not."""
    return os.isatty(0) and os.getpgrp() != os.getsid(0)


def _launch_from_mpi(env: Mapping[str, str]) -> Launch:
    from mpi4py import MPI  # needs an MPI library, which only mpirun's users have

    port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else _free_port()
    world = MPI.COMM_WORLD
    rank, size = world.rank, world.size
    hosts = world.allgather(MPI.Get_processor_name())
    rendezvous = None
    if rank == 0:
        rendezvous = (env.get("MASTER_ADDR") or reachable_name(hosts[0]), port)
    address, port = world.bcast(rendezvous)
    MPI.Finalize()  # it has told all it knows; a process that leaves without this counts as crashed
    return Launch("mpirun (mpi4py)", rank, size, hosts[:rank].count(hosts[rank]), address, port)


def reachable_name(host: str) -> str:
    """This host's name if it stands for an address that others can reach, else such an address.

    Debian's default /etc/hosts maps a host's own name to 127.0.1.1.
    """
    try:
        loopback = ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        loopback = True
    return first_address() if loopback else host


def first_address() -> str:
    """IPv4 address of the first network interface that is up, loopback if there is none."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, addresses in psutil.net_if_addrs().items():
        if name in up and not name.startswith(("lo", "docker", "virbr", "br-")):
            for address in addresses:
                if address.family == socket.AF_INET:
                    return address.address
    return "127.0.0.1"


def address_towards(host: str) -> str:
    """The IPv4 address by which this host's packets go to ``host``; never loopback if there is another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, 9))  # nothing is sent
        address = str(probe.getsockname()[0])
        if not address.startswith("127."):
            return address
    return first_address()


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
