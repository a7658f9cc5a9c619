"""Run a function on N ranks: real processes, gloo over localhost, a fresh interpreter state each.

``importing`` torch, transformers and deepspeed takes seconds, so ranks are forked from a server that has imported
them once and has touched neither autograd nor a process group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240
RENDEZVOUS_SECONDS = 20  # of commands: no launcher ends those that wait for one that died
# Also the tests whose functions ranks run, which each of them would import anew to find them.
PRELOAD = [
    *("tests.ranks", "lora_one_dist.run.story", "tests.models", "tests.runs"),
    *(f"tests.{name}" for name in ("cluster.test_comm", "cluster.test_hierarchy", "cluster.test_meeting")),
    *(f"tests.{name}" for name in ("base.test_loading", "initialise.test_gradient", "initialise.test_pairs")),
    *(f"tests.{name}" for name in ("train.test_optim", "data.test_packing", "kill_harness", "run.test_story")),
    *(f"tests.{name}" for name in ("run.test_resume", "run.test_disks", "run.test_memory", "run.test_seq2seq")),
    "tests.frozen",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    """Below those that the system gives to outgoing connections, of which one could take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(21_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, init: bool = True, hosts: Sequence[str] | None = None
) -> list[Any]:
    """Call ``function(*args)`` on each of ``world_size`` ranks, after ``comm.init`` unless it calls it itself.

    Args:
        hosts: the name that each rank's host shall have; all ranks are on this one if not given.

    Returns the results by rank.

    Raises AssertionError with the first failing rank's traceback, or if a rank neither ends nor answers in time.
    """
    pipes, processes = [], []
    for env, host in _environments(world_size, hosts):
        receive, send = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(env, host, send, init, function, args), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    outcomes: list[tuple[str, Any]] = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            outcomes.append(("hung", f"no answer in {TIMEOUT_SECONDS} s"))
            continue
        try:
            outcomes.append(pickle.loads(pipe.recv_bytes()))
        except EOFError:
            outcomes.append(("died", f"exit code {processes[rank].exitcode}"))
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    # A rank that failed explains those that hang because of it: report it first.
    failed = sorted(
        (r for r in range(world_size) if outcomes[r][0] != "ok"), key=lambda r: outcomes[r][0] in ("hung", "died")
    )
    assert not failed, f"rank {failed[0]} of {world_size} {outcomes[failed[0]][0]}:\n{outcomes[failed[0]][1]}"
    return [value for _, value in outcomes]


def _environments(world_size: int, hosts: Sequence[str] | None) -> list[tuple[dict[str, str], str]]:
    """The launch variables and the host's name of each rank."""
    names = tuple(hosts or [socket.gethostname()] * world_size)
    env = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        ({**env, "RANK": str(rank), "LOCAL_RANK": str(names[:rank].count(names[rank]))}, names[rank])
        for rank in range(world_size)
    ]


def _become(env: dict[str, str], host: str) -> None:
    """Be a rank on a host, as far as this process can tell."""
    import torch

    os.environ.update(env)
    socket.gethostname = lambda: host
    torch.set_num_threads(1)


def _rank(
    env: dict[str, str], host: str, pipe: Any, init: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    from lora_one_dist.cluster import comm

    _become(env, host)
    try:
        if init:
            comm.init()
        outcome = ("ok", function(*args))
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))
    if outcome[0] == "ok":
        comm.shutdown()
    os._exit(0)  # after an error the watch ends peers that wait for this rank in a collective


def run_commands(
    folder: Path, world_size: int, function: Callable[..., Any], *args: Any, hosts: Sequence[str] | None = None
) -> list[tuple[int, str]]:
    """Do what launch/train.py does with ``function(*args)`` for a run; returns each rank's exit code and stderr."""
    processes = start_commands(folder, world_size, function, *args, hosts=hosts)
    for process in processes:
        process.join(TIMEOUT_SECONDS)
        if process.is_alive():
            process.kill()
    return [(process.exitcode, (folder / f"{rank}.stderr").read_text()) for rank, process in enumerate(processes)]


def start_commands(
    folder: Path, world_size: int, function: Callable[..., Any], *args: Any, hosts: Sequence[str] | None = None
) -> list[Any]:
    """Start what :func:`run_commands` waits for.  A number that the function returns is the exit code."""
    processes = []
    for rank, (env, host) in enumerate(_environments(world_size, hosts)):
        streams = (folder / f"{rank}.stdout", folder / f"{rank}.stderr")
        processes.append(_context.Process(target=_command, args=(env, host, streams, function, args)))
        processes[-1].start()
    return processes


def _command(
    env: dict[str, str], host: str, streams: tuple[Path, Path], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    from lora_one_dist.cluster import comm
    from lora_one_dist.config.settings import CommConfig

    _become(env, host)
    _write_to(streams)
    try:
        comm.init(CommConfig(rendezvous_seconds=RENDEZVOUS_SECONDS))
        code = function(*args)
        comm.shutdown()
    except Exception as error:
        comm.fail(error)
    os._exit(code or 0)


def run_script(folder: Path, *argv: object) -> tuple[int | None, str, str]:
    """Run ``python argv`` on no rank, without seconds of imports; returns its exit code, stdout and stderr."""
    streams = (folder / "script.stdout", folder / "script.stderr")
    process = _context.Process(target=_script, args=(streams, [str(argument) for argument in argv]))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    stdout, stderr = (path.read_text() for path in streams)
    return process.exitcode, stdout, stderr


def _script(streams: tuple[Path, Path], argv: list[str]) -> None:
    sys.argv = argv
    _write_to(streams)
    runpy.run_path(argv[0], run_name="__main__")


def _write_to(streams: tuple[Path, Path]) -> None:
    """Standard output and error of this process."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
