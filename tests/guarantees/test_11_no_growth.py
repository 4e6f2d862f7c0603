"""Guarantee 11: opening and closing connections for ever does not grow memory; a closed socket's
operations are all given back; what a socket reads ahead of dequeue is bounded."""

from __future__ import annotations

import gc
import socket
import time

import asyncio_native as an
import pytest
from support import (
    PATIENCE,
    SLOWNESS,
    check_python,
    drain,
    keep,
    nothing,
    pair,
    pattern,
    pump,
    settle,
    tells_memory,
)

MEBIBYTE = 1 << 20

GROWTH = """
    import gc, sys
    import asyncio_native as an
    from support import *

    port = an.CompletionPort()
    listener, address = listening(port, "{family}")
    listener.accept(multishot=True)

    def life():
        {life}

    def lives(count):
        for _ in range(count):
            life()
            release_kept()
        return resident_memory()

    lives({count} // 5)
    before = lives(100)
    after = lives({count})
    print(before, after)
    assert after - before < 3 * (1 << 20), (before, after)
    assert port.in_flight == 1, "the accept alone"
"""

SERVED = """client = dial(address)
        server = one(port).accepted
        port.associate(server)
        server.recv(multishot=True)
        client.sendall(b"x" * 1000)
        server.send(one(port).data, quiet=True)
        read_exactly(client, 1000)
        reset(client)
        drain(port, lambda found: found and not found[-1].more)
        server.close()"""
ABANDONED = """client = dial(address)
        server = one(port).accepted
        port.associate(server, object())
        server.recv(multishot=True)
        server.recv_into(bytearray(1000))
        server.send(bytes(1000))
        server.send(bytes(4 << 20), quiet=True)
        server.send(bytes(4 << 20))
        server.close()
        client.close()
        drain(port, 4)"""


@tells_memory
@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("served", 20_000), ("abandoned", 3_000)])
def test_connections_do_not_grow_memory(backend: str, name: str, count: int) -> None:
    life = {"served": SERVED, "abandoned": ABANDONED}[name]
    check_python(GROWTH.format(family="ipv4", life=life, count=count // SLOWNESS), backend)


@tells_memory
@pytest.mark.slow
@pytest.mark.parametrize(
    "deed",
    [
        "port.post(object())",
        "sock.send(b'x' * 100); one(port); peer.recv(100)",
        "sock.send(b'x' * 100, quiet=True); peer.recv(100)",
        "sock.recv().cancel(); one(port)",
        "sock.recv_into(bytearray(1000)).cancel(); one(port)",
        "peer.sendall(b'x' * 5000); sock.recv(); one(port); sock.recv(); sock.cancel(); one(port)",
        "an.AsyncSocket().close()",
        "an.CompletionPort().close()",
    ],
)
def test_operations_do_not_grow_memory(backend: str, deed: str) -> None:
    count = (2_000 if "CompletionPort" in deed else 30_000) // SLOWNESS
    check_python(
        f"""
        import gc
        import asyncio_native as an
        from support import *

        port = an.CompletionPort()
        sock, peer = pair(port)

        def deeds(count):
            for number in range(count):
                {deed}
                if number % 1000 == 999:
                    while port.dequeue_many(timeout=0):
                        pass
            while port.dequeue_many(timeout=0):
                pass
            return resident_memory()

        deeds({count} // 5)
        before = deeds({count} // 5)
        after = deeds({count})
        assert after - before < 2 * (1 << 20), (before, after)
        """,
        backend,
    )


@tells_memory
def test_memory_of_a_slow_reader_comes_back(backend: str) -> None:
    """What was copied for quiet sends is given back once it went out."""
    check_python(
        """
        import gc
        import asyncio_native as an
        from support import *

        port = an.CompletionPort()
        before = resident_memory()
        for _ in range(3):
            sock, peer = pair(port, small=True)
            for _ in range(64):
                sock.send(bytearray(1 << 20), quiet=True)
            held = resident_memory() - before
            assert held > 32 << 20, held
            sock.close()
            peer.close()
            settle(port)
        gc.collect()
        left = resident_memory() - before
        assert left < 16 << 20, left
        """,
        backend,
    )


def test_a_closed_sockets_operations_are_all_given_back(port: an.CompletionPort) -> None:
    for _ in range(20):
        sock, _ = pair(port, small=True)
        for _ in range(20):
            sock.recv(10)
            sock.send(bytes(100_000))
        sock.close()
    drain(port, lambda _: not port.in_flight)


def test_python_objects_are_all_given_back(port: an.CompletionPort) -> None:
    def life() -> None:
        sock, peer = pair(port, small=True, state=[1])
        sock.recv(multishot=True)
        sock.recv_into(bytearray(10))
        sock.send(bytes(4 * MEBIBYTE))
        sock.send(bytes(4 * MEBIBYTE), quiet=True)
        peer.sendall(b"x")
        settle(port, 0.005)
        sock.close()
        peer.close()
        drain(port, lambda _: not port.in_flight)

    def alive() -> int:
        gc.collect()
        kinds = (an.AsyncSocket, an.Operation, an.Completion)
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    life()
    before = alive()
    for _ in range(20):
        life()
    assert alive() <= before


def small_inbound(port: an.CompletionPort) -> tuple[an.AsyncSocket, socket.socket]:
    """A pair with small kernel buffers for what the peer sends."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        peer = keep(socket.socket())
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        peer.connect(listener.getsockname())
        ours, _ = listener.accept()
    peer.setblocking(False)
    sock = an.AsyncSocket.adopt(ours)
    port.associate(sock)
    return sock, peer


def push(peer: socket.socket, data: bytes) -> int:
    """How much of the data the peer's window takes now."""
    pushed = 0
    while pushed < len(data):
        try:
            pushed += peer.send(data[pushed:])
        except BlockingIOError:
            break
    return pushed


def progress(port: an.CompletionPort, rounds: int) -> None:
    """Lets the port look at the system without taking a receive: the queue's head is posts.

    A busy queue polls the system every 64 completions."""
    for _ in range(rounds):
        completions = port.dequeue_many(64, timeout=0)
        assert all(c.kind is an.POST for c in completions)


def test_what_one_socket_reads_ahead_is_bounded(port: an.CompletionPort) -> None:
    sock, peer = small_inbound(port)
    sock.recv(multishot=True)
    rounds = 1500
    for _ in range(64 * rounds):
        port.post()
    pushed = 0
    block = bytes(MEBIBYTE)
    for _ in range(rounds):
        pushed += push(peer, block)
        progress(port, 1)
    assert pushed <= 2 * MEBIBYTE, "the kernel's buffers, and 1 MiB ahead"
    left = pushed
    deadline = time.monotonic() + PATIENCE
    while left:
        assert time.monotonic() < deadline, f"{left} bytes never came"
        left -= sum(c.transferred for c in port.dequeue_many(timeout=0.1))
    nothing(port)


def test_a_socket_that_was_full_goes_on(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(multishot=True)
    for _ in range(64 * 200):
        port.post()
    whole = pattern(24 * MEBIBYTE)
    peer.setblocking(False)
    pushed = 0
    for _ in range(200):
        pushed += push(peer, whole[pushed : pushed + 300_000])
        progress(port, 1)
    data = bytearray()
    deadline = time.monotonic() + 2 * PATIENCE
    while len(data) < len(whole):
        assert time.monotonic() < deadline, f"{len(data)} of {pushed} bytes"
        pushed += push(peer, whole[pushed : pushed + 300_000])
        for completion in port.dequeue_many(timeout=0.01):
            data += completion.data or b""
    assert data == whole


@pytest.mark.slow
def test_what_a_port_reads_ahead_is_bounded(port: an.CompletionPort) -> None:
    pairs = [small_inbound(port) for _ in range(128)]
    for sock, _ in pairs:
        sock.recv(multishot=True)
    rounds = 600
    for _ in range(64 * rounds):
        port.post()
    pushed = 0
    block = bytes(MEBIBYTE)
    for _ in range(rounds):
        for _, peer in pairs:
            pushed += push(peer, block)
        progress(port, 1)
    # Up to 256 KiB may be in the kernel for each of these connections.
    assert pushed <= (64 + 128 // 4) * MEBIBYTE
    left = pushed
    deadline = time.monotonic() + 2 * PATIENCE
    while left:
        assert time.monotonic() < deadline, f"{left} bytes never came"
        left -= sum(c.transferred for c in port.dequeue_many(timeout=0.1))


def test_one_big_completion_may_be_over_the_bound(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sock.recv(8 * MEBIBYTE, multishot=True)
    whole = pattern(4 * MEBIBYTE)
    peer.setblocking(False)
    data, pushed = bytearray(), 0
    while len(data) < len(whole):
        pushed += push(peer, whole[pushed:])
        for completion in drain(port, 1):
            data += completion.data or b""
    assert data == whole


def test_quiet_sends_that_drained_hold_nothing(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    for _ in range(5):
        sock.send(pattern(2 * MEBIBYTE), quiet=True)
        data, _ = pump(port, peer, 2 * MEBIBYTE)
        assert data == pattern(2 * MEBIBYTE)
    assert sock.unsent == 0
