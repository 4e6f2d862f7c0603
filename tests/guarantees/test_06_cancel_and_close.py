"""Guarantee 6: cancel and close return at once; the operations complete with the cancelled error
(or with success, if they won the race); a closed socket's descriptor is never reused while an
operation could still act on it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    cancelled,
    datagram,
    dial,
    drain,
    keep,
    listening,
    nothing,
    one,
    pair,
    settle,
    stall,
    stdlib_listener,
    stdlib_pair,
)

WAITING: dict[str, Callable[[an.CompletionPort], an.Operation]] = {
    "accept": lambda port: listening(port)[0].accept(),
    "accept multishot": lambda port: listening(port)[0].accept(multishot=True),
    "recv": lambda port: pair(port)[0].recv(),
    "recv multishot": lambda port: pair(port)[0].recv(multishot=True),
    "recv_into": lambda port: pair(port)[0].recv_into(bytearray(1)),
    "recvfrom": lambda port: datagram(port)[0].recvfrom(),
    "recvfrom multishot": lambda port: datagram(port)[0].recvfrom(multishot=True),
    "recvfrom_into": lambda port: datagram(port)[0].recvfrom_into(bytearray(1)),
    "send": lambda port: stall(port, pair(port, small=True)[0]),
}
ENDS: dict[str, Callable[[an.Operation], Any]] = {
    "operation.cancel": lambda operation: operation.cancel(),
    "socket.cancel": lambda operation: operation.socket and operation.socket.cancel(),
    "socket.close": lambda operation: operation.socket and operation.socket.close(),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", WAITING)
def test_a_waiting_operation_ends_as_cancelled(
    port: an.CompletionPort, name: str, end: str
) -> None:
    operation = WAITING[name](port)
    settle(port, 0.01)
    began = time.monotonic()
    ENDS[end](operation)
    assert time.monotonic() - began < 1
    completion = one(port)
    assert completion.operation is operation
    assert cancelled(completion)
    assert not completion.more
    assert not operation.pending
    nothing(port, 0.02)


@pytest.mark.parametrize("end", ENDS)
def test_it_may_be_ended_right_after_its_start(port: an.CompletionPort, end: str) -> None:
    sock, _ = pair(port)
    operation = sock.recv()
    ENDS[end](operation)
    assert cancelled(one(port))


@pytest.mark.parametrize("end", ENDS)
def test_ending_from_another_thread_wakes_the_dequeue(port: an.CompletionPort, end: str) -> None:
    sock, _ = pair(port)
    operation = sock.recv(multishot=True)
    thread = threading.Timer(0.1, ENDS[end], args=(operation,))
    thread.start()
    completion = port.dequeue(timeout=PATIENCE)
    thread.join()
    assert completion is not None
    assert completion.operation is operation
    assert cancelled(completion)


def test_a_success_that_won_the_race_is_kept(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.send(b"won")
    assert operation is not None
    assert peer.recv(3) == b"won"
    assert not operation.cancel()
    sock.close()
    completion = one(port)
    assert completion.operation is operation
    assert completion.result() == 3


def test_close_keeps_what_was_queued_before_it(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    operations = [sock.send(b"%d" % n) for n in range(5)]
    receive = sock.recv()
    sock.close()
    completions = drain(port, 6)
    assert [c.operation for c in completions if c.kind is an.SEND] == operations
    assert all(c.result() == 1 for c in completions if c.kind is an.SEND)
    assert [c.operation for c in completions if cancelled(c)] == [receive]


def test_close_returns_at_once_with_much_in_flight(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    for _ in range(2000):
        sock.recv(10)
        sock.send(bytes(100_000))
    began = time.monotonic()
    sock.close()
    assert time.monotonic() - began < 2
    completions = drain(port, 4000)
    assert sum(cancelled(c) for c in completions) >= 3900


def test_cancel_with_much_in_flight_counts_all(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    for _ in range(3000):
        sock.recv(10)
    assert sock.cancel() == 3000
    assert all(cancelled(c) for c in drain(port, 3000))


def test_what_was_not_received_stays_for_the_next(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    for _ in range(50):
        operation = sock.recv()
        peer.sendall(b"x")
        if operation.cancel():
            assert cancelled(one(port))
            sock.recv()
        assert one(port).data == b"x"


def test_a_new_socket_with_the_same_number_is_not_disturbed(port: an.CompletionPort) -> None:
    """Close with operations in flight, open others at once: the old ones must not act on them."""
    for round_number in range(100):
        old, old_peer = pair(port)
        operations = [old.recv(), old.recv(multishot=True)]
        if round_number % 2:
            settle(port, 0)
        old.close()
        new, new_peer = pair(port)
        receive = new.recv()
        old_peer.close()
        new_peer.sendall(b"for the new one")
        completions = drain(port, 3)
        assert {c.operation for c in completions if cancelled(c)} == set(operations)
        [completion] = [c for c in completions if c.operation is receive]
        assert completion.data == b"for the new one"
        assert completion.socket is new
        new.close()


def test_a_foreign_socket_with_the_same_number_is_not_disturbed(port: an.CompletionPort) -> None:
    for _ in range(100):
        old, _ = pair(port, small=True)
        old.recv(multishot=True)
        old.send(b"old" * 3_000_000)
        old.close()
        foreign, foreign_peer = stdlib_pair()
        with foreign:
            foreign_peer.sendall(b"for the foreign one")
            port.dequeue_many(timeout=0)
            assert foreign.recv(100) == b"for the foreign one"
            foreign.setblocking(False)
            foreign_peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                foreign_peer.recv(1)
        foreign_peer.close()
    settle(port)


@pytest.mark.posix("only POSIX has files and sockets in one row of numbers, and takes the lowest")
def test_a_foreign_file_with_the_same_number_is_not_disturbed(port: an.CompletionPort) -> None:
    for _ in range(100):
        sock, _ = pair(port)
        sock.recv(multishot=True)
        sock.close()
        settle(port, 0)
        read_end, write_end = os.pipe()
        os.write(write_end, b"x")
        assert settle(port, 0) == []
        assert os.read(read_end, 10) == b"x"
        os.close(read_end)
        os.close(write_end)


@pytest.mark.posix("only POSIX has files and sockets in one row of numbers, and takes the lowest")
def test_the_descriptor_is_free_after_close(port: an.CompletionPort) -> None:
    sock, _ = pair(port)
    number = sock.fileno()
    sock.recv()
    sock.close()
    assert sock.fileno() == -1
    settle(port)
    with pytest.raises(OSError):
        os.fstat(number)


@pytest.mark.slow
def test_cancel_races_completion_in_threads(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    stop = threading.Event()
    current: list[an.Operation] = []

    def cancel() -> None:
        while not stop.is_set():
            if current:
                current[-1].cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    sent = got = 0
    deadline = time.monotonic() + 2
    try:
        while time.monotonic() < deadline:
            operation = sock.recv(1)
            current.append(operation)
            peer.sendall(b"x")
            sent += 1
            completion = one(port)
            assert completion.operation is operation
            assert completion.data == b"x" or cancelled(completion)
            got += completion.transferred
    finally:
        stop.set()
        thread.join()
    while got < sent:
        sock.recv()
        got += one(port).transferred
    nothing(port)


@pytest.mark.slow
def test_close_races_everything_in_threads(port: an.CompletionPort) -> None:
    """Another thread closes sockets while this one starts on them and dequeues."""
    jobs: list[an.AsyncSocket] = []
    stop = threading.Event()

    def close() -> None:
        while not stop.is_set() or jobs:
            if jobs:
                jobs.pop().close()

    thread = threading.Thread(target=close)
    thread.start()
    started = ended = 0
    deadline = time.monotonic() + 2
    try:
        while time.monotonic() < deadline:
            sock, peer = pair(port)
            jobs.append(sock)
            for start in (sock.recv, lambda s=sock: s.send(b"x" * 1000), sock.recv):
                try:
                    start()
                    started += 1
                except OSError as error:
                    assert error.errno == 9  # noqa: PT017 (EBADF: the race was lost)
            ended += len(port.dequeue_many(timeout=0))
            peer.close()
    finally:
        stop.set()
        thread.join()
    ended += len(drain(port, started - ended))
    assert ended == started
    nothing(port)


def test_close_during_connect_and_accept(port: an.CompletionPort) -> None:
    for _ in range(50):
        listener, address = listening(port)
        accept = listener.accept(multishot=True)
        client = an.AsyncSocket()
        port.associate(client)
        connect = client.connect(address)
        client.close()
        listener.close()
        completions = drain(
            port,
            lambda found: {c.operation for c in found if not c.more} == {accept, connect},
        )
        for completion in completions:
            if completion.accepted is not None:
                completion.accepted.close()


def test_close_of_one_does_not_end_others(port: an.CompletionPort) -> None:
    socks = [pair(port) for _ in range(10)]
    for sock, _ in socks:
        sock.recv()
    for sock, _ in socks[::2]:
        sock.close()
    assert all(cancelled(c) for c in drain(port, 5))
    for _, peer in socks[1::2]:
        peer.sendall(b"x")
    assert {c.socket for c in drain(port, 5)} == {sock for sock, _ in socks[1::2]}


def test_ten_thousand_operations_are_closed_with_their_port(backend: str) -> None:
    port = an.CompletionPort(backend)
    socks = [pair(port) for _ in range(20)]
    operations = [sock.recv(10) for sock, _ in socks for _ in range(500)]
    assert port.in_flight == 10_000
    began = time.monotonic()
    port.close()
    assert time.monotonic() - began < 5
    assert port.in_flight == 0
    assert not any(operation.pending for operation in operations)
    for _, peer in socks:
        assert peer.recv(1) == b""


def test_a_listener_closed_with_clients_waiting_lets_them_go(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    clients = [dial(address) for _ in range(3)]
    listener.close()
    for client in clients:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            continue


def test_a_cancelled_connect_leaves_its_port_usable(port: an.CompletionPort) -> None:
    listener = stdlib_listener()
    sock = an.AsyncSocket()
    port.associate(sock)
    operation = sock.connect(listener.getsockname())
    operation.cancel()
    completion = one(port)
    assert completion.operation is operation
    sock.close()
    other = an.AsyncSocket()
    port.associate(other)
    other.connect(listener.getsockname())
    assert one(port).result() is None


def test_shutdown_does_not_wait_for_the_port(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv()
    sock.shutdown(socket.SHUT_RDWR)
    assert keep(peer).recv(1) == b""
    assert one(port).data == b""
