"""What the parts of the Python API cost, by pytest-benchmark.

    python -m pytest bench/test_parts.py

Each figure is for a batch of 64 operations; `ns_each` in the extra information is the median for
one. What a batch needs before is prepared outside the measured piece. Where the system is part of
it (a receive, an accept), its call is in the figure as well: pytest-benchmark measures wall time.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import build

BATCH = 64
ROUNDS = 200
MESSAGE = b"x" * 64
PATIENCE_S = 10

BACKENDS = [
    backend.name
    for backend in an.backends()
    if backend.available and backend.name in ("epoll", "io_uring", "kqueue", "iocp")
]


class Bench:
    """A port with a connected pair, and the measuring."""

    def __init__(self, backend: str, benchmark: BenchmarkFixture) -> None:
        self.port = an.CompletionPort(backend, concurrency=1)
        self.benchmark = benchmark
        ours, self.peer = socket.socketpair()
        self.peer.settimeout(PATIENCE_S)
        self.sock = an.AsyncSocket.adopt(ours)
        self.port.associate(self.sock)

    def measure(self, run: Callable[[], object], prepare: Callable[[], object]) -> None:
        """Measures `run`, a batch of operations, each time after `prepare`."""

        def set_up() -> None:
            prepare()

        pedantic: Any = self.benchmark.pedantic  # it has no types
        pedantic(run, setup=set_up, rounds=ROUNDS, warmup_rounds=10)
        stats: Any = self.benchmark.stats
        self.benchmark.extra_info["ns_each"] = round(stats.stats.median * 1e9 / BATCH)

    def dequeue_all(self, kind: an.OperationKind, count: int = BATCH) -> None:
        """Dequeues that many completions of that kind and uses nothing of them."""
        while count > 0:
            found = self.port.dequeue_many(BATCH, PATIENCE_S)
            assert found, "nothing came"
            assert found[0].kind is kind
            count -= len(found)

    def drain(self) -> None:
        """The peer reads away a batch of messages."""
        left = BATCH * len(MESSAGE)
        while left > 0:
            left -= len(self.peer.recv(left))

    def close(self) -> None:
        """Closes all."""
        self.port.close()
        self.peer.close()


@pytest.fixture(params=BACKENDS)
def bench(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[Bench]:
    """On each backend that a user would choose."""
    made = Bench(request.param, benchmark)
    yield made
    made.close()


def nothing() -> None:
    """Nothing to prepare."""


def test_send_quiet(bench: Bench) -> None:
    """The call and its system call."""
    sent = 0

    def prepare() -> None:
        nonlocal sent
        if sent:
            bench.drain()
        sent = BATCH

    def run() -> None:
        send = bench.sock.send
        for _ in range(BATCH):
            send(MESSAGE, quiet=True)

    bench.measure(run, prepare)


def test_send_with_a_completion(bench: Bench) -> None:
    """Start only; the completions are dequeued outside."""
    sent = 0

    def prepare() -> None:
        nonlocal sent
        if sent:
            bench.dequeue_all(an.SEND)
            bench.drain()
        sent = BATCH

    def run() -> None:
        send = bench.sock.send
        for _ in range(BATCH):
            send(MESSAGE)

    bench.measure(run, prepare)


def test_dequeue_send(bench: Bench) -> None:
    """Completions that are queued already."""

    def prepare() -> None:
        for _ in range(BATCH):
            bench.sock.send(MESSAGE)
        bench.drain()

    bench.measure(lambda: bench.dequeue_all(an.SEND), prepare)


def test_dequeue_post(bench: Bench) -> None:
    """The cheapest completion that there is."""

    def prepare() -> None:
        for _ in range(BATCH):
            bench.port.post()

    bench.measure(lambda: bench.dequeue_all(an.POST), prepare)


def test_post_and_dequeue(bench: Bench) -> None:
    """Both ends of the queue."""

    def run() -> None:
        for _ in range(BATCH):
            bench.port.post()
        bench.dequeue_all(an.POST)

    bench.measure(run, nothing)


def test_dequeue_timer(bench: Bench) -> None:
    """Timers that are due."""

    def prepare() -> None:
        for _ in range(BATCH):
            bench.port.timer(0)

    bench.measure(lambda: bench.dequeue_all(an.TIMER), prepare)


def test_timer_started_and_cancelled(bench: Bench) -> None:
    """As a timeout that was not needed."""

    def run() -> None:
        for timer in [bench.port.timer(60) for _ in range(BATCH)]:
            timer.cancel()
        bench.dequeue_all(an.TIMER)

    bench.measure(run, nothing)


def test_dequeue_recv(bench: Bench) -> None:
    """Receives of 64 connections, of one message each, by multishots."""
    peers = []
    for _ in range(BATCH):
        ours, peer = socket.socketpair()
        sock = an.AsyncSocket.adopt(ours)
        bench.port.associate(sock)
        sock.recv(multishot=True)
        peers.append(peer)

    def prepare() -> None:
        for peer in peers:
            peer.send(MESSAGE)

    bench.measure(lambda: bench.dequeue_all(an.RECV), prepare)
    for peer in peers:
        peer.close()


def test_recv_started_and_dequeued(bench: Bench) -> None:
    """One-shot receives of what is there: an operation each."""

    def prepare() -> None:
        bench.peer.sendall(MESSAGE * BATCH)

    def run() -> None:
        for _ in range(BATCH):
            bench.sock.recv(len(MESSAGE))
        bench.dequeue_all(an.RECV)

    bench.measure(run, prepare)


def test_dequeue_accept(bench: Bench) -> None:
    """Connections that wait; each becomes a socket, which is closed outside."""
    listener = an.AsyncSocket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2 * BATCH)
    bench.port.associate(listener)
    listener.accept(multishot=True)
    address = listener.getsockname()
    dialled: list[socket.socket] = []
    accepted: list[an.Completion] = []

    def prepare() -> None:
        for completion in accepted:
            assert completion.accepted is not None
            completion.accepted.close()
        for sock in dialled:
            sock.close()
        accepted.clear()
        dialled[:] = [socket.create_connection(address) for _ in range(BATCH)]

    def run() -> None:
        while len(accepted) < BATCH:
            accepted.extend(bench.port.dequeue_many(BATCH, PATIENCE_S))

    bench.measure(run, prepare)
    for sock in dialled:
        sock.close()
    for completion in accepted:
        completion.result()[0].close()


def datagrams(bench: Bench) -> tuple[an.AsyncSocket, socket.socket]:
    """A datagram socket of ours and one that sends to it."""
    sock = an.AsyncSocket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    bench.port.associate(sock)
    sender = socket.socket(type=socket.SOCK_DGRAM)
    sender.bind(("127.0.0.1", 0))
    sender.connect(sock.getsockname())
    return sock, sender


def test_dequeue_connect(bench: Bench) -> None:
    """Connections on loopback, which are made at once."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * BATCH) as listener:
        address = listener.getsockname()
        made: list[an.AsyncSocket] = []

        def prepare() -> None:
            for sock in made:
                listener.accept()[0].close()
                sock.close()
            made[:] = [an.AsyncSocket() for _ in range(BATCH)]
            for sock in made:
                bench.port.associate(sock)
                sock.connect(address)

        bench.measure(lambda: bench.dequeue_all(an.CONNECT), prepare)
        for sock in made:
            sock.close()


def test_dequeue_sendfile(bench: Bench, tmp_path: Path) -> None:
    """Of small files; the completions are queued already."""
    path = tmp_path / "file"
    path.write_bytes(MESSAGE)
    with path.open("rb") as file:

        def prepare() -> None:
            for _ in range(BATCH):
                bench.sock.sendfile(file)
            bench.drain()

        bench.measure(lambda: bench.dequeue_all(an.SENDFILE), prepare)


def test_dequeue_disconnect(bench: Bench) -> None:
    """The end of the sending side of 64 connections."""
    pairs: list[tuple[an.AsyncSocket, socket.socket]] = []

    def prepare() -> None:
        for sock, peer in pairs:
            sock.close()
            peer.close()
        pairs.clear()
        for _ in range(BATCH):
            ours, peer = socket.socketpair()
            sock = an.AsyncSocket.adopt(ours)
            pairs.append((sock, peer))
            bench.port.associate(sock)
            sock.disconnect()

    bench.measure(lambda: bench.dequeue_all(an.DISCONNECT), prepare)
    for sock, peer in pairs:
        sock.close()
        peer.close()


def test_dequeue_recvfrom(bench: Bench) -> None:
    """Datagrams with their senders' addresses."""
    sock, sender = datagrams(bench)
    sock.recvfrom(multishot=True)

    def prepare() -> None:
        for _ in range(BATCH):
            sender.send(MESSAGE)

    bench.measure(lambda: bench.dequeue_all(an.RECVFROM), prepare)
    sender.close()


def test_sendto_quiet(bench: Bench) -> None:
    """Datagrams to an address."""
    sock, sender = datagrams(bench)
    address = sender.getsockname()
    sent = 0

    def prepare() -> None:
        nonlocal sent
        for _ in range(sent):
            sender.recv(len(MESSAGE))
        sent = BATCH

    def run() -> None:
        for _ in range(BATCH):
            sock.sendto(MESSAGE, address, quiet=True)

    bench.measure(run, prepare)
    sender.close()


def test_dequeue_sendto(bench: Bench) -> None:
    """Completions that are queued already."""
    sock, sender = datagrams(bench)
    address = sender.getsockname()

    def prepare() -> None:
        for _ in range(BATCH):
            sock.sendto(MESSAGE, address)
        for _ in range(BATCH):
            sender.recv(len(MESSAGE))

    bench.measure(lambda: bench.dequeue_all(an.SENDTO), prepare)
    sender.close()


@pytest.fixture(scope="session")
def parts_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bench/c/parts.c on the library."""
    folder = tmp_path_factory.mktemp("bench")
    build.build_native_programs(folder)
    return folder / "parts"


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_c_interface(
    backend: str, parts_program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints its figures; the library must not be dearer than the system call it makes."""
    ended = subprocess.run(
        [parts_program, f"backend={backend}"], capture_output=True, text=True, check=True
    )
    figures: dict[str, Any] = json.loads(ended.stdout)
    with capsys.disabled():
        print(f"\nC, {figures.pop('backend')}, ns each: {json.dumps(figures)}")
    assert figures["send_quiet"] < 2 * figures["send_system_call"]
    assert figures["post_and_dequeue"] < figures["send_system_call"]
