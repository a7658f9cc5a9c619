"""One failure ends the whole job, and every rank knows whose it was.  Sockets and one thread; no torch.

A rank that raises inside a collective, or dies, leaves its peers waiting there, where no agreement can reach them.  So
each rank holds one idle TCP connection to rank 0, watched by a daemon thread:

- a rank that fails says so; rank 0 passes the first failure on, and every process ends with that message
- a process that ends without a word closes its connection: the kernel says so at once
- a host that is down or cut off stops answering the kernel's keepalive probes: the connection breaks on both sides
  after ``lost_after`` seconds, and the host that was cut off ends itself

The kernel keeps the connections alive, not the process: a rank that computes for minutes without letting its threads
run is not taken for dead.  The thread also sees signals while the main thread waits in a collective: SIGUSR1, and once
a stop is accepted SIGTERM, ask the job to stop when it next can; otherwise SIGTERM, and always SIGINT, end it.  It ends
a process whose launcher is gone.  Idle cost: one connection a rank, one probe each few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 2.0  # between two looks at the parent process
SETTLE_SECONDS = 0.5  # after a process is lost: others lost with it, and explanations on their way, arrive
ANSWER_SECONDS = 5.0  # for rank 0 to answer a report
LINE_BYTES = 65536
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_SIGNALS = (signal.SIGUSR1,)  # and SIGTERM once accepts_stop


class _Line:
    """JSON values, one a line, over a connected socket."""

    def __init__(self, connection: socket.socket, lost_after: float):
        self.connection = connection
        self.buffer = b""
        connection.settimeout(ANSWER_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe = max(1, int(lost_after / 4))
        for name, value in (("TCP_KEEPIDLE", probe), ("TCP_KEEPINTVL", probe), ("TCP_USER_TIMEOUT", lost_after * 1000)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))

    def send(self, value: dict[str, Any]) -> None:
        """Raises OSError if the connection is broken."""
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived.  Raises EOFError at its end, OSError if it broke, ValueError if a stranger speaks."""
        received = self.connection.recv(LINE_BYTES)
        if not received:
            raise EOFError
        *lines, self.buffer = (self.buffer + received).split(b"\n")
        if len(self.buffer) > LINE_BYTES:
            raise ValueError("a line without end")
        return [json.loads(line) for line in lines]


class Watch:
    """The connection of this process to the others.  ``end`` is called once, in the thread, to leave the process."""

    def __init__(self, rank: int, host: str, lost_after: float, launched: bool, end: Callable[[str, int], None]):
        """
        Args:
            lost_after: seconds without an answer of the network after which a peer counts as lost.
            launched: by a launcher, without which this process shall not live on.
            end: told the failure and an exit code; must not return.
        """
        self.rank, self.host, self.lost_after, self.end = rank, host, lost_after, end
        self.parent = os.getppid() if launched else None
        self.selector = selectors.DefaultSelector()
        self.wake, self.woken = socket.socketpair()
        for end_of_pair in (self.wake, self.woken):
            end_of_pair.setblocking(False)
        self.selector.register(self.woken, selectors.EVENT_READ, self._on_wake)
        self.hub: _Line | None = None  # rank 0, from any other rank
        self.members: dict[int, tuple[str, _Line]] = {}  # the other ranks, from rank 0
        self.lost: dict[int, tuple[str, str]] = {}
        self.judge_at = float("inf")
        self.own = ""  # what stands if nobody knows better
        self.failure = ""  # the job's first failure
        self.exit_code = 1
        self.decided = threading.Event()
        self.reporting = False  # the main thread waits in report() and will end the process itself
        self.outbox: str | None = None
        self.leaving = False
        self.accepts_stop = False  # the job can stop with nothing lost: SIGTERM asks for that too
        self.stop_asked = False
        self.alone = False  # rank 0 is lost: it tells nobody of the failure
        self.token = ""
        self.old_handlers: dict[int, Any] = {}

    # Setting up: main thread

    def listen(self, address: str) -> dict[str, Any]:
        """On rank 0: take the others' connections at one own address.  Returns what :meth:`connect` needs."""
        server = socket.create_server((address, 0), backlog=1024)
        server.setblocking(False)
        self.token = secrets.token_hex(16)
        self.selector.register(server, selectors.EVENT_READ, lambda: self._on_connection(server))
        return {"host": self.host, "address": address, "port": server.getsockname()[1], "token": self.token}

    def connect(self, host: str, address: str, port: int, token: str) -> None:
        """On the other ranks: connect to rank 0.  Raises OSError if it cannot be reached."""
        connection = socket.create_connection((address, port), timeout=self.lost_after)
        self.hub, self.hub_host = _Line(connection, self.lost_after), host
        self.hub.send({"rank": self.rank, "host": self.host, "token": token})
        self.selector.register(connection, selectors.EVENT_READ, self._on_hub)

    def start(self) -> None:
        """Watch from now on."""
        if threading.current_thread() is threading.main_thread():
            for number in (*ENDING_SIGNALS, *STOP_SIGNALS):
                # The thread reads the signal's number from the socket, also while the main thread is in a collective.
                self.old_handlers[number] = signal.signal(number, lambda *_: None)
            signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
            # Under launch/train.py one that came before has waited.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            os.register_at_fork(after_in_child=self._forget_signals)
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def _forget_signals(self) -> None:
        """A signal to a forked helper process is not one to this rank."""
        if self.old_handlers:
            signal.set_wakeup_fd(-1)
            for number, handler in self.old_handlers.items():
                signal.signal(number, handler)
            self.old_handlers = {}

    # What the main thread says

    def report(self, failure: str, symptom: bool = False) -> str:
        """Tell all ranks that this one failed.  Returns the job's first failure: this one, or one that came before.

        Args:
            symptom: the failure looks like the consequence of another rank's; wait for that one to become known.
        """
        self.reporting = True
        if symptom and self.decided.wait(self.lost_after + SETTLE_SECONDS + ANSWER_SECONDS):
            return self.failure
        self.outbox = failure
        self._wake_thread()
        return self.failure if self.decided.wait(ANSWER_SECONDS) else failure

    def _wake_thread(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.wake.send(b"\0")

    def leave(self) -> None:
        """Stop watching: the job is done.  Call on every rank after a barrier."""
        self.leaving = True
        self._wake_thread()
        self.thread.join(ANSWER_SECONDS)
        if self.stop_asked:  # done as asked: a repeated signal shall not spoil the exit code
            self.old_handlers = dict.fromkeys(self.old_handlers, signal.SIG_IGN)
        self._forget_signals()

    # The thread

    def _run(self) -> None:
        while not (self.leaving or self.decided.is_set()):
            for key, _ in self.selector.select(min(POLL_SECONDS, max(0.0, self.judge_at - time.monotonic()))):
                key.data()
            if self.parent is not None and os.getppid() != self.parent:
                self._tell(f"rank {self.rank} on {self.host} failed: its launcher (process {self.parent}) is gone")
            if time.monotonic() >= self.judge_at:
                self._judge()
        if self.leaving and not self.decided.is_set():
            self._close()
        elif not self.reporting:  # else the main thread has more to say, and ends the process itself
            self.end(self.failure, self.exit_code)

    def _tell(self, failure: str, weak: bool = False) -> None:
        """Tell rank 0.  ``weak``: a launcher that ends the other ranks after one died must not hide that one."""
        if self.hub is None:
            self._hear(failure, weak)
            return
        self.own = self.own or failure
        self.judge_at = min(self.judge_at, time.monotonic() + ANSWER_SECONDS)
        try:
            self.hub.send({"failed": failure, "weak": weak})
        except OSError:  # rank 0 is gone too: nobody is left to tell
            self._decide(failure)

    def _hear(self, failure: str, weak: bool) -> None:
        """Rank 0: of a failure.  One that stands by itself is the job's; a weak one if nothing explains it soon."""
        if weak:
            self.own = self.own or failure
            self.judge_at = min(self.judge_at, time.monotonic() + SETTLE_SECONDS)
        else:
            self._decide(failure)

    def _decide(self, failure: str) -> None:
        """The first failure stands.  On rank 0: tell the others."""
        if self.decided.is_set():
            return
        self.failure = failure
        for _, line in list(self.members.values()):
            with contextlib.suppress(OSError):
                line.send({"failure": failure})
        self.decided.set()

    def _close(self) -> None:
        for _, line in list(self.members.values()):
            with contextlib.suppress(OSError):
                line.send({"over": True})
        if self.hub is not None:
            with contextlib.suppress(OSError):
                self.hub.send({"left": True})
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self.selector.close()

    def _on_wake(self) -> None:
        for number in self.woken.recv(256):
            if number == 0 and self.outbox is not None:
                self._tell(self.outbox)
            elif number in STOP_SIGNALS or (number == signal.SIGTERM and self.accepts_stop):
                self.stop_asked = True
                name = signal.Signals(number).name
                print(f"rank {self.rank} on {self.host}: {name}, stops when it next can", file=sys.stderr, flush=True)
            elif number in ENDING_SIGNALS:
                self.exit_code = 128 + number
                name = signal.Signals(number).name
                self._tell(f"rank {self.rank} on {self.host} failed: received {name}", weak=True)

    def _on_connection(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        line = _Line(connection, self.lost_after)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._on_member(line))

    def _on_member(self, line: _Line) -> None:
        sender = next((rank for rank, (_, known) in self.members.items() if known is line), None)
        try:
            for message in line.receive():
                if sender is None:
                    if not secrets.compare_digest(str(message.get("token")), self.token):
                        raise ValueError("not of this job")
                    sender = int(message["rank"])
                    self.members[sender] = (str(message["host"]), line)
                elif "failed" in message:
                    self._hear(str(message["failed"]), bool(message.get("weak")))
                elif "left" in message:
                    self._drop(line, sender)
        except (ValueError, TypeError, AttributeError, RecursionError):  # a stranger, whatever it says
            self._drop(line, sender)
        except (EOFError, OSError) as error:
            host = self._drop(line, sender)
            if sender is not None and host is not None:
                self.lost[sender] = (host, _how(error, self.lost_after))
                self.judge_at = min(self.judge_at, time.monotonic() + SETTLE_SECONDS)

    def _drop(self, line: _Line, sender: int | None) -> str | None:
        """Close a connection.  Returns the host of the rank behind it."""
        self.selector.unregister(line.connection)
        line.connection.close()
        return self.members.pop(sender)[0] if sender is not None else None

    def _judge(self) -> None:
        """Rank 0: name the first lost rank and those lost with it, or a signal.  Others: rank 0 does not answer."""
        if not self.lost:
            self._decide(self.own)
            return
        rank, (host, how) = next(iter(self.lost.items()))
        also = [f"{other} on {where}" for other, (where, _) in self.lost.items() if other != rank]
        self._decide(
            f"rank {rank} on {host} failed: {how}" + (f"; lost with it: rank {', '.join(also)}" if also else "")
        )

    def _on_hub(self) -> None:
        assert self.hub is not None, "registered with the connection"
        try:
            for message in self.hub.receive():
                if "failure" in message:
                    self._decide(str(message["failure"]))
                elif "over" in message:
                    self.leaving = True
        except (EOFError, OSError) as error:
            self.alone, how = True, _how(error, self.lost_after)
            self._decide(f"rank 0 on {self.hub_host} failed: {how}; seen from rank {self.rank} on {self.host}")


def _how(error: BaseException, lost_after: float) -> str:
    if isinstance(error, EOFError | ConnectionResetError):
        return "its process ended without a word (killed? the kernel's out-of-memory killer writes to dmesg)"
    return f"it cannot be reached for {lost_after:g} s (host down, or network cut: {error})"
