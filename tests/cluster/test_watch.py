"""One failure ends every process with its words, and nothing else ends any.  Forked processes, a Watch in each."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_one_dist.cluster import watch as watching
from lora_one_dist.cluster.watch import Watch

HOSTS = ("a", "b", "b", "c")  # of ranks 0 to 3
LOST_AFTER = 4.0
SECONDS = 10  # for what takes under one, on a busy machine
WITHOUT_A_WORD = "its process ended without a word (killed? the kernel's out-of-memory killer writes to dmesg)"

Act = Callable[[Watch], Any]
_fork = multiprocessing.get_context("fork")  # nothing is imported again, and what a test sets is set in its processes


class Job:
    """Ranks that are connected, and then each do their act; one that returns from it ends, telling what it returned.

    The main thread of a rank without an act waits for ever, as in a collective.
    """

    def __init__(self, folder: Path, *acts: Act):
        self.folder = folder
        self.pipes, self.processes, self.ends = [], [], {}
        for rank, act in enumerate(acts):
            pipe, theirs = _fork.Pipe()
            body = (rank, len(acts), act, False, theirs, self.hub if rank else None, folder)
            self.processes.append(_fork.Process(target=_live, args=body, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(pipe)
            if rank == 0:
                self.hub = pipe.recv()
        for pipe in self.pipes:
            pipe.recv()  # rank 0's comes when it knows the others
        for pipe in self.pipes:
            pipe.send("go")

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def await_log(self, rank: int, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.log(rank):
            assert time.monotonic() < deadline, f"rank {rank} has not logged {text!r}: {self.log(rank)}"
            time.sleep(0.01)

    def end(self) -> tuple[list[str], list[int]]:
        """What each rank was told or returned, and its exit code."""
        for process in self.processes:
            process.join(SECONDS)
            assert process.exitcode is not None, f"{process.name} goes on"
        told = [path.read_text() if path.exists() else "" for path in map(self._told, range(len(self.processes)))]
        return told, [process.exitcode for process in self.processes]

    def _told(self, rank: int) -> Path:
        return self.folder / f"{rank}.told"


def _live(rank: int, size: int, act: Act, launched: bool, pipe: Any, hub: Any, folder: Path) -> None:
    log = open(folder / f"{rank}.log", "w", buffering=1)  # noqa: SIM115 (until the process ends)
    os.dup2(log.fileno(), 2)
    sys.stderr = log

    def end(told: Any, code: int = 0) -> None:
        (folder / f"{rank}.told").write_text(str(told))
        os._exit(code)

    watch = Watch(rank, HOSTS[rank], LOST_AFTER, launched, end)
    if hub is None:
        pipe.send(watch.listen("127.0.0.1"))
    else:
        watch.connect(**hub)
    watch.start()
    while rank == 0 and len(watch.members) < size - 1:
        time.sleep(0.001)
    pipe.send(os.getpid())
    pipe.recv()
    end(act(watch))


def wait(_: Watch) -> None:
    while True:
        time.sleep(60)


def report(text: str, after: float = 0.0, symptom: bool = False) -> Act:
    def act(watch: Watch) -> str:
        time.sleep(after)
        return watch.report(text, symptom)

    return act


def vanish(after: float = 0.0) -> Act:
    def act(_: Watch) -> None:
        time.sleep(after)
        os._exit(0)  # even so: the job was not done

    return act


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Starts a job; whatever a test left running ends with it."""
    jobs = []

    def start(*acts: Act) -> Job:
        jobs.append(Job(tmp_path, *acts))
        return jobs[-1]

    yield start
    for process in (process for job in jobs for process in job.processes):
        process.kill()


@pytest.fixture
def patient(monkeypatch):
    """More time for what belongs together to arrive: a busy machine may stop a process for a while."""
    monkeypatch.setattr(watching, "SETTLE_SECONDS", 0.8)


@pytest.mark.parametrize("reporter", [0, 2])
def test_report_of_one_rank_reaches_all(reporter, start):
    acts = [report("rank x on y failed: disk full") if rank == reporter else wait for rank in range(4)]
    told, codes = start(*acts).end()
    assert told == ["rank x on y failed: disk full"] * 4
    assert codes == [0 if rank == reporter else 1 for rank in range(4)], "the reporter ends itself"


def test_first_report_stands(start):
    told, _ = start(wait, report("first", after=0.1), report("second", after=0.4), vanish(after=0.4)).end()
    assert told[:3] == ["first"] * 3


def test_rank_that_ends_without_a_word_is_named_with_those_lost_soon_after(patient, start):
    told, codes = start(wait, vanish(), vanish(after=0.2), wait).end()
    expected = f"rank 1 on b failed: {WITHOUT_A_WORD}; lost with it: rank 2 on b"
    assert (told[0], told[3]) == (expected, expected)
    assert codes == [1, 0, 0, 1]


def test_report_explains_a_rank_that_ended_just_before(patient, start):
    told, _ = start(wait, vanish(), report("rank 2 on b failed: disk full", after=0.2)).end()
    assert told[0] == "rank 2 on b failed: disk full"


def test_loss_of_rank_0_is_seen_by_each_of_the_others(start):
    told, codes = start(vanish(), wait, wait).end()
    assert told[1:] == [f"rank 0 on a failed: {WITHOUT_A_WORD}; seen from rank {rank} on b" for rank in (1, 2)]
    assert codes == [0, 1, 1]


def test_symptom_waits_for_the_failure_that_caused_it(start):
    symptom = report("rank 1 on b failed: connection closed by peer", symptom=True)
    told, _ = start(symptom, symptom, report("rank 2 on b failed: the cause", after=0.5)).end()
    assert told == ["rank 2 on b failed: the cause"] * 3


def test_symptom_stands_if_no_other_failure_becomes_known(start, monkeypatch):
    monkeypatch.setattr(watching, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(sys.modules[__name__], "LOST_AFTER", 0.5)
    started = time.monotonic()
    told, _ = start(wait, report("timed out", symptom=True), report("timed out too", 0.5, symptom=True)).end()
    assert told == ["timed out"] * 3
    assert time.monotonic() - started >= LOST_AFTER + watching.SETTLE_SECONDS, "by then a lost host would be known"


# Signals --------------------------------------------------------------------------------------------------------------


def locked(until: Any) -> None:
    """Keep the main thread in a call that lets no Python handler run before it returns, as a collective does."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: an unlocked one
    threading.Thread(target=lambda: (until.wait(), libc.pthread_mutex_unlock(mutex)), daemon=True).start()
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


def test_logged_signal_is_told_at_once_and_the_process_goes_on(start):
    told_of_both = _fork.Event()

    def act(watch: Watch) -> str:
        locked(until=told_of_both)
        watch.leave()
        return "went on"

    job = start(act, act)
    time.sleep(0.2)  # they are inside the call by then
    for rank, host in ((0, "a"), (1, "b")):
        job.signal(rank, signal.SIGUSR1)
        job.await_log(rank, f"rank {rank} on {host}: SIGUSR1, stops when it next can\n")
    told_of_both.set()
    assert job.end() == (["went on"] * 2, [0, 0])
    assert [job.log(rank).count("\n") for rank in (0, 1)] == [1, 1]


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_ending_signal_ends_the_job_from_inside_a_collective(rank, number, start):
    job = start(*[lambda _: locked(until=_fork.Event())] * 3)
    job.signal(rank, number)
    told, codes = job.end()
    assert told == [f"rank {rank} on {HOSTS[rank]} failed: received {number.name}"] * 3
    assert codes == [128 + number if other == rank else 1 for other in range(3)]


def test_signal_to_the_others_does_not_hide_the_rank_that_was_lost(patient, start):
    """A launcher that sees one rank die ends the others; which news comes first is chance."""
    job = start(wait, wait, wait, wait)
    job.signal(0, signal.SIGTERM)
    job.signal(1, signal.SIGTERM)
    time.sleep(0.1)
    job.signal(2, signal.SIGKILL)
    told, codes = job.end()
    assert told == [f"rank 2 on b failed: {WITHOUT_A_WORD}"] * 2 + ["", f"rank 2 on b failed: {WITHOUT_A_WORD}"]
    assert codes == [143, 143, -9, 1]


def test_signal_to_a_forked_child_is_not_one_to_its_parent(start):
    def act(watch: Watch) -> list[int]:
        ended_by = []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            child = os.fork()
            if child == 0:
                time.sleep(2)
                os._exit(0)
            time.sleep(0.1)
            os.kill(child, number)
            ended_by.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
        time.sleep(0.3)  # the watch would have heard of it
        watch.leave()
        return ended_by

    job = start(act)
    assert job.end() == ([str([int(signal.SIGTERM), int(signal.SIGUSR1)])], [0])
    assert job.log(0) == ""


# Ends that are none of a failure's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("delays", [(0, 0.1, 0.3), (0.3, 0.1, 0), (0, 0, 0)])
def test_leaving_in_any_order_is_silent(delays, start, monkeypatch):
    monkeypatch.setattr(watching, "SETTLE_SECONDS", 0.1)

    def leave(delay: float) -> Act:
        def act(watch: Watch) -> Any:
            time.sleep(delay)
            watch.leave()
            time.sleep(0.5 - delay)  # all watch for longer than a loss takes to be known
            return signal.getsignal(signal.SIGTERM)

        return act

    before = signal.getsignal(signal.SIGTERM)
    job = start(*map(leave, delays))
    assert job.end() == ([str(before)] * 3, [0] * 3)
    assert [job.log(rank) for rank in range(3)] == [""] * 3


def hello(**changes: Any) -> bytes:
    return json.dumps({"rank": 1, "host": "z", "token": "0" * 32, **changes}).encode() + b"\n"


STRANGERS = {
    "a wrong token": hello(),
    "a token of another type": hello(token=[1]),
    "a token in another alphabet": hello(token="\N{SNOWMAN}"),
    "a report without a token": b'{"failed": "the stranger"}\n',
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "bytes that are no text": b"\xff\xfe\n",
    "a number": b"5\n",
    "a list": b"[]\n",
    "a deep list": b"[" * 60000 + b"\n",
    "a line without end": b"x" * 2 * watching.LINE_BYTES,
}


@pytest.mark.parametrize("speech", STRANGERS.values(), ids=STRANGERS)
def test_stranger_is_dropped_and_harms_nothing(speech, start):
    dropped = _fork.Event()
    job = start(wait, lambda watch: dropped.wait() and watch.report("rank 1 on b failed: disk full"))
    address = (job.hub["address"], job.hub["port"])
    with socket.create_connection(address), socket.create_connection(address, timeout=SECONDS) as stranger:
        with contextlib.suppress(ConnectionError):
            stranger.sendall(speech)
            assert stranger.recv(1) == b"", "dropped, without an answer"
        with socket.create_connection(address) as reset:
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        dropped.set()
        assert job.end()[0] == ["rank 1 on b failed: disk full"] * 2
    assert job.log(0) == ""


@pytest.mark.parametrize("launched", [True, False])
def test_process_lives_and_dies_with_its_launcher_if_it_has_one(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.1)

    def launch(pipe: Any) -> None:
        if os.fork() == 0:
            _live(0, 1, wait, launched, pipe, None, tmp_path)
        pipe.close()
        time.sleep(60)

    pipe, theirs = _fork.Pipe()
    launcher = _fork.Process(target=launch, args=(theirs,))
    launcher.start()
    theirs.close()
    pipe.recv()
    pid = pipe.recv()
    pipe.send("go")
    launcher.kill()
    launcher.join()
    try:
        if launched:
            with pytest.raises(EOFError):  # its end of the pipe is closed
                pipe.poll(SECONDS) and pipe.recv()
            expected = f"rank 0 on a failed: its launcher (process {launcher.pid}) is gone"
            assert (tmp_path / "0.told").read_text() == expected
        else:
            assert not pipe.poll(0.5), "five looks later it still lives"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
