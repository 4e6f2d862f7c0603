"""A client process of ``c10k``: some thousand clients on one completion port.

It does as little as it can for each message, so that it measures the server and not itself: one
comparison against a table that is never copied, one clock, one quiet send.
"""

from __future__ import annotations

import gc
import random
import signal
import socket
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection

import asyncio_native as an

from .c10k_board import Board, Column, Failed, Order, Phase, PhaseEnded, Ready, listen_to_parent
from .common import error_text
from .system import advice

BATCH = 512
"""Completions in one batch: on poll each wait looks at every socket, so batches are large."""

STARTS_IN_ONE_PASS = 128
"""Clients begun between two batches: beginning all at once would hold up what is under way."""

WINDOWS_TOP = 1 << 24
"""At most 16 MiB of table in each process; see `Pattern`."""

WAIT_SECONDS = 0.25
"""The longest wait; bounds how late a deadline is noticed."""

WAIT_FOR_ROOM_SECONDS = 0.002
"""The wait while the server has enough connections to accept: nothing wakes us when it has."""

RECEIVE_BYTES = 262_144

BIND_ADDRESS_NO_PORT = 24
"""Linux' IP_BIND_ADDRESS_NO_PORT, a name in `socket` from Python 3.12 on."""


class Pattern:
    """The messages: pieces of one table of random bytes, each piece at an offset of its own.

    So every client's every message differs from those that could be mistaken for it, and comparing
    needs no copy. Piece number k begins at offset k; numbers begin again after 2**24, far more than
    are ever under way at once. A piece of a few bytes can only differ as much as so few bytes can.
    """

    def __init__(self, clients: int, messages: int, size: int) -> None:
        self._clients = clients
        self.offsets = min(clients * messages, WINDOWS_TOP)
        self.table = random.Random(clients).randbytes(self.offsets + size)

    def offset(self, client: int, message: int) -> int:
        """Where in the table this message of this client begins."""
        return (message * self._clients + client) % self.offsets


@dataclass(frozen=True)
class Task:
    """What one client process has to do.

    row: its row on the board.
    first, count: its clients are the numbers from `first` to `first + count - 1` ...
    clients: ... of so many in all processes.
    connecting: how many connections all processes together may have waiting for the server.
    clients_per_source: so many share a source address; 0 leaves the source to the system.
    timeout: seconds that each phase may take.
    """

    row: int
    first: int
    count: int
    clients: int
    messages: int
    size: int
    backend: str
    server: tuple[str, int]
    connecting: int
    clients_per_source: int
    timeout: float


class Client:
    """One connection: what it sent last and what of it has come back."""

    __slots__ = (
        "connected",
        "half_closed",
        "left",
        "message",
        "number",
        "over",
        "owes",
        "position",
        "sent_at",
        "socket",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.socket: an.AsyncSocket | None = None
        self.connected = False
        self.half_closed = False
        self.over = False  # finished or lost: what still comes is of no interest
        self.owes = False  # has not ended this phase
        self.message = -1  # number of the message under way
        self.sent_at = 0.0
        self.position = 0  # in the pattern's table, of the next byte that must come
        self.left = 0  # bytes of the message still to come; 0: nothing may come


class ClientGroup:
    """All clients of this process, driven through the phases by one thread."""

    def __init__(self, task: Task, connection: Connection, board: Board) -> None:
        self._task = task
        self._connection = connection
        self._board = board
        self._pattern = Pattern(task.clients, task.messages, task.size)
        self._port = an.CompletionPort(task.backend, concurrency=1)
        self._clients = [Client(task.first + index) for index in range(task.count)]
        self._phase: Phase | None = None
        self._deadline = 0.0
        self._begun = 0  # clients that have begun this phase, from the first on
        self._owing = 0  # clients that have not ended it
        self._latencies = array("f")
        self._errors: Counter[str] = Counter()
        self._started = 0
        self._connect_failed = 0
        self._connected = 0
        self._echoed = 0
        self._finished = 0
        self._lost = 0

    def close(self) -> None:
        """Closes all connections at once."""
        self._port.close()

    def obey(self, order: Phase | Order) -> None:
        """Called in the thread that listens to the parent; the port brings it to ours."""
        self._port.post(order)

    def run(self) -> None:
        """Does what the parent orders until told to stop."""
        while True:
            more_to_begin = self._begin_some()
            completions = self._port.dequeue_many(BATCH, self._wait_seconds(more_to_begin))
            if self._handle(completions) is Order.STOP:
                return
            if self._phase is not None and time.monotonic() >= self._deadline:
                self._give_up()
            self._publish()
            if self._phase is not None and not self._owing:
                self._end_phase()

    def _wait_seconds(self, more_to_begin: bool) -> float | None:
        if self._phase is None:
            return None
        if more_to_begin:
            return 0.0
        if self._begun < len(self._clients):
            return WAIT_FOR_ROOM_SECONDS
        return max(0.0, min(WAIT_SECONDS, self._deadline - time.monotonic()))

    def _publish(self) -> None:
        row, put = self._task.row, self._board.set
        put(row, Column.STARTED, self._started)
        put(row, Column.CONNECT_FAILED, self._connect_failed)
        put(row, Column.CONNECTED, self._connected)
        put(row, Column.ECHOED, self._echoed)
        put(row, Column.FINISHED, self._finished)
        put(row, Column.LOST, self._lost)

    # Phases: each client begins it, and ends it by `_settle` or by `_lose`.

    def _begin_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._deadline = time.monotonic() + self._task.timeout
        self._begun = 0
        self._owing = 0
        for client in self._clients:
            client.owes = not client.over
            self._owing += client.owes
        if phase is Phase.MESSAGES:
            gc.freeze()  # the clients stay for the whole run: collections need not walk them

    def _begin_some(self) -> bool:
        """Lets some more clients begin this phase; true if more of them can begin at once."""
        if self._phase is None:
            return False
        room = min(STARTS_IN_ONE_PASS, len(self._clients) - self._begun)
        if room and self._phase is Phase.CONNECT:
            room = min(room, self._task.connecting - self._board.not_accepted)
        if room <= 0:
            return False
        for client in self._clients[self._begun : self._begun + room]:
            if client.over:
                continue
            if self._phase is Phase.CONNECT:
                self._connect(client)
            elif self._phase is Phase.MESSAGES:
                self._send_next(client, time.monotonic())
            else:
                self._half_close(client)
        self._begun += room
        return self._begun < len(self._clients)

    def _settle(self, client: Client) -> None:
        if client.owes:
            client.owes = False
            self._owing -= 1

    def _lose(self, client: Client, reason: str) -> None:
        if client.over:
            return
        client.over = True
        client.left = 0
        self._lost += 1
        if client.socket is not None:
            self._connect_failed += not client.connected
            client.socket.close()
        phase = "between phases" if self._phase is None else self._phase.value
        self._errors[f"{phase}: {reason}"] += 1
        self._settle(client)

    def _give_up(self) -> None:
        """The deadline has passed: who has not ended this phase is lost."""
        for client in self._clients:
            if client.owes:
                self._lose(client, f"not done within {self._task.timeout:g} s")

    def _end_phase(self) -> None:
        phase = self._phase
        assert phase is not None
        self._phase = None
        self._connection.send(PhaseEnded(phase, self._latencies.tobytes(), dict(self._errors)))
        self._latencies = array("f")
        self._errors.clear()

    # What a client does.

    def _connect(self, client: Client) -> None:
        try:
            sock = client.socket = an.AsyncSocket(socket.AF_INET, socket.SOCK_STREAM)
            self._started += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._task.clients_per_source:
                if sys.platform == "linux":  # else a port would be taken for all destinations
                    sock.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
                source = 1 + client.number // self._task.clients_per_source
                sock.bind((f"127.0.0.{source}", 0))
            self._port.associate(sock, client)
            sock.connect(self._task.server)
        except OSError as error:
            self._lose(client, _described(error))

    def _send_next(self, client: Client, now: float) -> None:
        message = client.message + 1
        if message == self._task.messages:
            self._settle(client)
            return
        position = self._pattern.offset(client.number, message)
        size = self._task.size
        client.message = message
        client.position = position
        client.left = size
        client.sent_at = now
        assert client.socket is not None
        client.socket.send(self._pattern.table[position : position + size], quiet=True)

    def _half_close(self, client: Client) -> None:
        assert client.socket is not None
        client.half_closed = True
        client.socket.disconnect()

    # What comes back.

    def _handle(self, completions: list[an.Completion]) -> Order | None:
        """Handles a batch; returns `Order.STOP` if that was ordered."""
        matches = self._pattern.table.startswith
        for completion in completions:
            if completion.kind is an.RECV:
                client: Client = completion.state
                data = completion.data
                if not data:
                    self._ended(client, completion)
                    continue
                left = client.left - len(data)
                if left < 0 or not matches(data, client.position):
                    self._lose(client, "bytes came back that are not those sent")
                elif left:
                    client.left = left
                    client.position += len(data)
                else:
                    now = time.monotonic()
                    self._latencies.append(now - client.sent_at)
                    self._echoed += 1
                    client.left = 0
                    self._send_next(client, now)
            elif completion.kind is an.POST:
                if completion.state is Order.STOP:
                    return Order.STOP
                self._begin_phase(completion.state)
            elif completion.kind is an.CONNECT:
                self._connect_ended(completion.state, completion)
            elif completion.error and completion.state is not None:  # half-closing, a quiet send
                self._lose(completion.state, _failure(completion))
        return None

    def _connect_ended(self, client: Client, completion: an.Completion) -> None:
        if client.over:
            return
        if completion.error:
            self._lose(client, _failure(completion))
            return
        client.connected = True
        self._connected += 1
        assert client.socket is not None
        client.socket.recv(RECEIVE_BYTES, multishot=True)
        self._settle(client)

    def _ended(self, client: Client, completion: an.Completion) -> None:
        """The end of the stream, or the failure of receiving."""
        if client.over:
            return
        if completion.error:
            self._lose(client, _failure(completion))
        elif not client.half_closed:
            self._lose(client, "the server closed the connection")
        else:
            client.over = True
            self._finished += 1
            assert client.socket is not None
            client.socket.close()
            self._settle(client)


def _described(error: OSError) -> str:
    hint = advice(error.errno or 0)
    return f"{error_text(error)} ({hint})" if hint else error_text(error)


def _failure(completion: an.Completion) -> str:
    try:
        completion.result()
    except OSError as error:
        return _described(error)
    return "failed"


def work(connection: Connection, board: Board, task: Task) -> None:
    """A client process: says that it is ready, then does what the parent orders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        group = ClientGroup(task, connection, board)
    except (OSError, MemoryError) as error:
        reason = error_text(error) if isinstance(error, OSError) else "out of memory"
        connection.send(Failed(f"a client process cannot begin: {reason}"))
        return
    try:
        connection.send(Ready())
        listen_to_parent(connection, group.obey)
        group.run()
    finally:
        group.close()
