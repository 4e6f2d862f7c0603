"""Threads that run Python side by side: what the interpreter lock would hide.

All of it runs on every interpreter, and says most on a free-threaded one, where it is also tested
that importing the package leaves the lock off. tests/guarantees/test_07_threads.py has what threads
are promised everywhere.
"""

from __future__ import annotations

import collections
import socket
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    check_python,
    datagram,
    eventually,
    one,
    pair,
    read_exactly,
    run_python,
    stdlib_datagram,
    stdlib_pair,
)

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

free_threaded = pytest.mark.skipif(
    not FREE_THREADED, reason="this interpreter was not built for free threads"
)


@contextmanager
def threads(*functions: Callable[[], object]) -> Iterator[None]:
    """Runs each in a thread of its own, all from the same moment on, until they are done."""
    problems: list[BaseException] = []
    together = threading.Barrier(len(functions))

    def work(function: Callable[[], object]) -> None:
        try:
            together.wait(PATIENCE)
            function()
        except BaseException as error:
            problems.append(error)

    running = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        for thread in running:
            thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in running), "a thread did not end"
    if problems:
        raise problems[0]


# -- the interpreter lock -------------------------------------------------------------------------


@free_threaded
def test_importing_it_leaves_the_interpreter_lock_off() -> None:
    check_python(
        """
        import sys, warnings
        warnings.simplefilter("error")  # what switches the lock on is told by a warning
        assert not sys._is_gil_enabled(), "PYTHON_GIL is set to 1"
        import asyncio_native as an
        assert not sys._is_gil_enabled()
        with an.CompletionPort() as port:
            port.post()
            assert port.dequeue().kind is an.POST
        assert not sys._is_gil_enabled()
        """,
        "poll",
    )


@free_threaded
def test_the_binding_that_counts_on_the_lock_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from asyncio_native import _native

    assert an.binding == "cffi"
    assert b"PyInit__fast" not in Path(_native.__file__).read_bytes()
    monkeypatch.setenv("ASYNCIO_NATIVE_BINDING", "c")
    ended = run_python("import asyncio_native", "poll")
    assert ended.returncode != 0
    assert "the binding in C is for CPython with the interpreter lock" in ended.stderr


# -- buffers --------------------------------------------------------------------------------------

STARTS: dict[str, Callable[[an.AsyncSocket, bytearray, Any], an.Operation | None]] = {
    "recv_into": lambda sock, buffer, _: sock.recv_into(buffer),
    "send": lambda sock, buffer, _: sock.send(buffer),
    "sendv": lambda sock, buffer, _: sock.sendv([buffer, b"and", buffer]),
    "recvfrom_into": lambda sock, buffer, _: sock.recvfrom_into(buffer),
    "sendto": lambda sock, buffer, address: sock.sendto(buffer, address),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("end", ["dequeue", "close"])
def test_a_buffer_is_free_again_though_the_thread_that_gave_it_does_nothing(
    backend: str, start: str, end: str
) -> None:
    buffer = bytearray(b"some")
    started, go_on = threading.Event(), threading.Event()
    with an.CompletionPort(backend) as port:
        if start in ("recvfrom_into", "sendto"):
            sock, _ = datagram(port)
            peer = stdlib_datagram()
            peer.connect(sock.getsockname())
            address = peer.getsockname()
        else:
            sock, peer = pair(port)
            address = None

        def give() -> None:
            STARTS[start](sock, buffer, address)
            started.set()
            assert go_on.wait(PATIENCE)

        with threads(give):
            try:
                assert started.wait(PATIENCE)
                if end == "dequeue":
                    peer.send(b"data")
                    assert one(port).error == 0
                else:
                    port.close()
                buffer.extend(b"more")
            finally:
                go_on.set()
        sock.close()


def test_buffers_are_free_when_a_port_was_closed_beside_threads_that_give_them(
    backend: str,
) -> None:
    for _ in range(5):
        port = an.CompletionPort(backend)
        sock, _ = pair(port)
        given: list[bytearray] = []
        busy = threading.Barrier(4)

        def give(port: an.CompletionPort = port, sock: an.AsyncSocket = sock) -> None:
            busy.wait(PATIENCE)
            while True:
                # Each for one operation: CPython 3.13 counts who holds a bytearray without a lock.
                buffers = [bytearray(8) for _ in range(3)]
                given.extend(buffers)
                try:
                    sock.recv_into(buffers[0])
                    sock.sendv(buffers[1:])
                except an.PortClosedError:
                    return

        def close(port: an.CompletionPort = port) -> None:
            busy.wait(PATIENCE)
            with suppress(an.PortClosedError):
                port.dequeue_many(timeout=0.01)
            port.close()

        with threads(give, give, close, close):
            pass
        assert port.in_flight == 0
        for buffer in given:
            buffer.extend(b"more")


# -- several threads on one port ------------------------------------------------------------------


def test_threads_that_come_to_dequeue_disturb_no_end_of_a_multishot(
    port: an.CompletionPort,
) -> None:
    connections, bytes_each = 60, 3
    received: collections.Counter[int] = collections.Counter()
    ends: list[int] = []
    lock = threading.Lock()
    done = threading.Event()

    def dequeue_once(max_count: int) -> None:
        for completion in port.dequeue_many(max_count, 0.05):
            with lock:
                received[completion.state] += len(completion.data)
                if not completion.more:
                    ends.append(completion.state)

    def come_and_go() -> None:
        """A thread's first dequeue, and each one that asks for more than before, makes a batch."""
        while not done.is_set():
            thread = threading.Thread(target=dequeue_once, args=(2,))
            thread.start()
            dequeue_once(2)
            thread.join(PATIENCE)

    def serve() -> None:
        try:
            for number in range(connections):
                ours, theirs = socket.socketpair()
                sock = an.AsyncSocket.adopt(ours)
                port.associate(sock, number)
                sock.recv(1, multishot=True)
                theirs.sendall(bytes(bytes_each))
                theirs.close()
                kept.append(sock)
            eventually(lambda: len(ends) == connections)
        finally:
            done.set()

    kept: list[an.AsyncSocket] = []
    with threads(serve, come_and_go, come_and_go):
        pass
    assert sorted(ends) == list(range(connections))
    assert received == dict.fromkeys(range(connections), bytes_each)
    assert port.in_flight == 0
    for sock in kept:
        sock.close()


def test_operations_are_looked_at_and_stopped_while_others_dequeue_them(
    port: an.CompletionPort,
) -> None:
    rounds = 80
    operations: list[an.Operation] = []
    seen: collections.Counter[int] = collections.Counter()
    started = threading.Event()
    lock = threading.Lock()

    def start() -> None:
        try:
            for number in range(rounds):
                ours, peer = stdlib_pair("ipv4")
                sock = an.AsyncSocket.adopt(ours)
                port.associate(sock, number)
                operations.append(sock.recv(4, multishot=True))
                operations.append(port.timer(0.002 * (number % 2), number))
                peer.sendall(b"12345678")
                peer.close()
                port.associate(sock, -number)
                if number % 3 == 0:
                    sock.close()
        finally:
            started.set()

    def look() -> None:
        while not started.is_set() or port.in_flight:
            for operation in operations[-6:]:
                repr(operation)
                if operation.socket is None:
                    operation.cancel()
                    continue
                try:
                    operation.pause()
                    operation.resume()
                except ValueError:
                    assert not operation.pending or operation.cancel() in (True, False)

    def dequeue() -> None:
        while not started.is_set() or port.in_flight:
            for completion in port.dequeue_many(4, 0.02):
                assert completion.operation is not None
                if completion.kind is an.RECV:
                    assert abs(completion.state) < rounds
                    repr(completion.socket)
                if not completion.more:
                    assert not completion.operation.pending
                    with lock:
                        seen[id(completion.operation)] += 1
            port.statistics()

    with threads(start, look, dequeue, dequeue):
        pass
    assert seen == dict.fromkeys(map(id, operations), 1)
    for operation in operations:
        if operation.socket is not None:
            operation.socket.close()


def test_a_failure_finds_its_socket_whichever_thread_sent_first(backend: str) -> None:
    for _ in range(10):
        with an.CompletionPort(backend) as port:
            sock, peer = pair(port, small=True, state="the state")

            def send(sock: an.AsyncSocket = sock) -> None:
                for _ in range(20):
                    sock.send(bytes(1 << 16), quiet=True)

            with threads(send, send, send):
                pass
            assert sock.unsent
            peer.close()
            failure = one(port)
            assert failure.kind is an.SEND
            assert failure.error and failure.operation is None and failure.transferred
            assert failure.socket is sock and failure.state == "the state"
            sock.close()


def test_addresses_are_encoded_in_several_threads(backend: str) -> None:
    """More of them than are kept, so that they are forgotten while others look them up."""
    peer = stdlib_datagram()
    with an.CompletionPort(backend) as port:
        sock, _ = datagram(port)

        def send(first: int) -> None:
            for number in range(first, first + 2500):
                # Each host of 127.0.0.0/8 is this machine. Nobody listens there.
                sock.sendto(b"lost", (f"127.3.{number >> 8}.{number & 255}", 9), quiet=True)
            sock.sendto(first.to_bytes(2, "big"), peer.getsockname(), quiet=True)

        starts = [0, 2500, 5000, 0]
        with threads(*(lambda first=first: send(first) for first in starts)):
            came = [int.from_bytes(peer.recv(16), "big") for _ in starts]
        assert sorted(came) == sorted(starts)
        sock.close()


# -- several ports in several threads -------------------------------------------------------------


def test_ports_in_threads_of_their_own_share_nothing(backend: str) -> None:
    ports, pairs, messages = 4, 3, 150
    served: list[list[int]] = []

    def serve(number: int) -> None:
        echoed = [0] * pairs
        own: collections.Counter[an.OperationKind] = collections.Counter()
        with an.CompletionPort(backend, concurrency=1) as port:
            ends = [pair(port, state=(number, index)) for index in range(pairs)]
            for sock, peer in ends:
                sock.recv(multishot=True)
                peer.sendall(bytes([number]) * 8)
            while min(echoed) < messages:
                for completion in port.dequeue_many(timeout=PATIENCE):
                    if completion.socket is None:
                        assert completion.state == number
                        own[completion.kind] += 1
                        continue
                    assert completion.socket.port is port and completion.state[0] == number
                    assert completion.data == bytes([number]) * 8
                    index = completion.state[1]
                    echoed[index] += 1
                    completion.socket.send(completion.data, quiet=True)
                    peer = ends[index][1]
                    peer.sendall(read_exactly(peer, 8))
                    port.post(number)
                    port.timer(0, number)
            counts = port.statistics()
            assert counts.bytes_received == counts.bytes_sent == 8 * sum(echoed)
            assert counts.dequeued == sum(echoed) + sum(own.values())
            for sock, _ in ends:
                sock.close()
        served.append(echoed)

    with threads(*(lambda number=number: serve(number) for number in range(ports))):
        pass
    assert len(served) == ports
