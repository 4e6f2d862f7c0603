"""What the processes of ``c10k`` share: counters in shared memory, and what they send each other.

The counters tell progress without a message for each step, and survive the process that wrote
them: if it dies, what it had done is still known.
"""

from __future__ import annotations

import enum
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

CONTEXT = multiprocessing.get_context("spawn")
"""New interpreters, not forks: a forked child would hold its parent's ports half alive."""


class Column(enum.IntEnum):
    """The counters of one client process."""

    STARTED = 0
    CONNECT_FAILED = 1
    CONNECTED = 2
    ECHOED = 3
    FINISHED = 4
    LOST = 5


_ACCEPTED = 0
_LAST_ACCEPT_NS = 1
_SERVER_CELLS = 2


class Board:
    """Counters in shared memory: the server's two, then a row for each client process.

    Each cell has one writer; any process may read it. A cell is one aligned 64-bit integer.
    """

    def __init__(self, client_processes: int) -> None:
        self._rows = client_processes
        self._cells = CONTEXT.RawArray("q", _SERVER_CELLS + client_processes * len(Column))

    def count_accepted(self) -> None:
        """Called by the server with each connection that it has accepted."""
        self._cells[_ACCEPTED] += 1
        self._cells[_LAST_ACCEPT_NS] = time.monotonic_ns()

    @property
    def accepted(self) -> int:
        """Connections that the server has accepted so far."""
        return int(self._cells[_ACCEPTED])

    @property
    def last_accept_ns(self) -> int:
        """When it accepted the last one, on the clock of `time.monotonic_ns`."""
        return int(self._cells[_LAST_ACCEPT_NS])

    def set(self, row: int, column: Column, value: int) -> None:
        """Called by client process number `row`."""
        self._cells[_SERVER_CELLS + row * len(Column) + column] = value

    def get(self, row: int, column: Column) -> int:
        """One counter of one client process."""
        return int(self._cells[_SERVER_CELLS + row * len(Column) + column])

    def total(self, column: Column) -> int:
        """One counter over all client processes."""
        return sum(self.get(row, column) for row in range(self._rows))

    @property
    def not_accepted(self) -> int:
        """Connections under way: started by a client, neither failed nor accepted by the server."""
        started = self.total(Column.STARTED) - self.total(Column.CONNECT_FAILED)
        return started - self.accepted


class Phase(enum.Enum):
    """What all clients do at the same time; the next begins when all have ended the one before."""

    CONNECT = "connect"
    MESSAGES = "messages"
    FINISH = "finish"


class Order(enum.Enum):
    """What else a process is told."""

    STOP = "stop"
    TELL_CPU_TIME = "tell CPU time"


@dataclass(frozen=True)
class Listening:
    """The server's first word: where it listens."""

    address: tuple[str, int]


@dataclass(frozen=True)
class Ready:
    """A client process' first word: it can begin."""


@dataclass(frozen=True)
class Failed:
    """The process cannot do its part and ends."""

    reason: str


@dataclass(frozen=True)
class CpuTime:
    """The answer to `Order.TELL_CPU_TIME`: of all threads, in seconds."""

    seconds: float


@dataclass(frozen=True)
class PhaseEnded:
    """A client process has ended a phase.

    latencies: 32-bit floats in seconds, one for each message of this phase.
    errors: what went wrong in this phase, with how many clients.
    """

    phase: Phase
    latencies: bytes = b""
    errors: dict[str, int] = field(default_factory=dict)


def listen_to_parent(connection: Connection, obey: Callable[[Phase | Order], None]) -> None:
    """Starts a thread that hands each order to `obey`; the process ends if the parent is gone."""

    def listen() -> None:
        while True:
            try:
                order = connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # nobody is left to report to; the other threads may be busy for long
            obey(order)

    threading.Thread(target=listen, name="orders", daemon=True).start()
