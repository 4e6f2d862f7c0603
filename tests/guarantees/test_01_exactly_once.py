"""Guarantee 1: a started operation that is not quiet yields exactly one completion (a multishot:
any number with `more`, then exactly one without), through the queue only."""

from __future__ import annotations

import contextlib
import gc
import random
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import asyncio_native as an
import pytest
from support import (
    by_operation,
    cancelled,
    datagram,
    dial,
    drain,
    listening,
    nothing,
    one,
    pair,
    pattern,
    pump,
    refusing_address,
    reset,
    settle,
    stdlib_listener,
)


def check_exactly_once(
    operations: Sequence[an.Operation | None], completions: list[an.Completion]
) -> None:
    """Each operation has completions with `more`, then one without; and there are no others."""
    found = by_operation(completions)
    assert set(found) == set(operations)
    for operation, its_completions in found.items():
        assert operation is not None
        assert [c.more for c in its_completions] == [True] * (len(its_completions) - 1) + [False]
        assert all(c.kind is operation.kind for c in its_completions)
        assert not operation.pending


def test_success_is_one_completion(port: an.CompletionPort, family: str) -> None:
    sock, peer = pair(port, family)
    operations = [sock.send(b"abc"), sock.recv(), sock.recv_into(bytearray(3)), sock.disconnect()]
    peer.sendall(b"x")
    first = drain(port, 3)
    peer.sendall(b"y")
    check_exactly_once(operations, first + drain(port, 1) + settle(port))


def test_failure_is_one_completion(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    operations = [sock.send(bytes(32 << 20)), sock.send(b"x"), sock.recv(), sock.disconnect()]
    settle(port)
    reset(peer)
    completions = drain(port, 4)
    check_exactly_once(operations, completions + settle(port))
    assert all(c.error for c in completions if c.kind is an.SEND)


def test_a_refused_connect_is_one_completion(port: an.CompletionPort) -> None:
    sock = an.AsyncSocket()
    port.associate(sock)
    operation = sock.connect(refusing_address())
    check_exactly_once([operation], drain(port, 1) + settle(port))


def test_cancel_is_one_completion(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    operations = [
        sock.recv(multishot=True),
        sock.recv(),
        sock.send(bytes(32 << 20)),
        sock.send(b""),
    ]
    settle(port)
    for operation in operations:
        assert operation is not None
        operation.cancel()
        operation.cancel()
    sock.cancel()
    check_exactly_once(operations, drain(port, 4) + settle(port))


def test_close_is_one_completion(port: an.CompletionPort) -> None:
    sock, _ = pair(port, small=True)
    operations = [
        sock.recv(multishot=True),
        sock.recv(),
        sock.send(bytes(32 << 20)),
        sock.send(b""),
    ]
    settle(port)
    sock.cancel()
    sock.close()
    sock.close()
    completions = drain(port, 4)
    check_exactly_once(operations, completions + settle(port))
    assert all(cancelled(c) for c in completions)


def test_end_of_stream_is_one_completion_for_each_receive(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operations: list[an.Operation | None] = [sock.recv() for _ in range(5)]
    operations.append(sock.recv(multishot=True))
    peer.close()
    completions = drain(port, 6)
    check_exactly_once(operations, completions + settle(port))
    assert all(c.data == b"" for c in completions)


def test_a_multishot_ends_exactly_once(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    operation = sock.recv(multishot=True)
    completions = []
    for _ in range(10):
        peer.sendall(b"x")
        completions.append(one(port))
    peer.close()
    completions += drain(port, lambda found: any(not c.more for c in found))
    operation.cancel()
    sock.cancel()
    sock.close()
    check_exactly_once([operation], completions + settle(port))


def test_nothing_is_reported_during_the_call_that_starts(port: an.CompletionPort) -> None:
    """A send that the system takes at once is still pending, and only the queue tells."""
    sock, peer = pair(port)
    peer.sendall(b"there already")
    for operation in (sock.send(b"x"), sock.recv()):
        assert operation is not None
        assert operation.pending
    assert port.in_flight == 2
    assert {c.kind for c in drain(port, 2)} == {an.SEND, an.RECV}


def test_each_kind_completes_once_when_its_socket_closes(
    port: an.CompletionPort, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(32 << 20))
    stream, _ = pair(port, small=True)
    listener, _ = listening(port)
    gram, _ = datagram(port)
    with open(tmp_path / "file", "rb") as file:
        operations = [
            listener.accept(),
            listener.accept(multishot=True),
            stream.sendfile(file),
            stream.send(b"x"),
            stream.sendv([b"x", b"y"]),
            stream.disconnect(),
            stream.recv(),
            stream.recv_into(bytearray(1)),
            gram.recvfrom(),
            gram.recvfrom_into(bytearray(1)),
            gram.recvfrom(multishot=True),
        ]
    settle(port)
    for sock in (stream, listener, gram):
        sock.close()
    completions = drain(port, len(operations))
    check_exactly_once(operations, completions + settle(port))
    assert all(cancelled(c) for c in completions)


def test_a_cancel_that_races_the_data_is_one_completion(port: an.CompletionPort) -> None:
    sock, peer = pair(port)
    sent = got = 0
    for _ in range(300):
        operation = sock.recv(1)
        peer.sendall(b"x")
        sent += 1
        won = operation.cancel()
        completion = one(port)
        assert completion.operation is operation
        assert cancelled(completion) == won
        got += completion.transferred
    while got < sent:
        sock.recv()
        got += one(port).transferred
    assert got == sent, "a cancelled receive takes no data with it"
    nothing(port)


@pytest.mark.parametrize("how", ["cancel", "close", "reset", "shut"])
def test_many_operations_end_once_each(port: an.CompletionPort, how: str) -> None:
    operations: list[an.Operation | None] = []
    pairs = [pair(port, small=True) for _ in range(20)]
    for sock, _ in pairs:
        operations += [
            sock.recv(10),
            sock.recv(multishot=True),
            sock.recv_into(bytearray(5)),
            sock.send(bytes(8 << 20)),
            sock.sendv([b"a", b"b"]),
            sock.disconnect(),
        ]
    completions = settle(port)
    ends: dict[str, Callable[[an.AsyncSocket, socket.socket], object]] = {
        "cancel": lambda sock, peer: sock.cancel(),
        "close": lambda sock, peer: sock.close(),
        "reset": lambda sock, peer: reset(peer),
        "shut": lambda sock, peer: sock.shutdown(socket.SHUT_RDWR),
    }
    for sock, peer in pairs:
        ends[how](sock, peer)
    completions += drain(port, len(operations) - len(completions))
    check_exactly_once(operations, completions + settle(port))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_random_life_completes_each_operation_once(port: an.CompletionPort, seed: int) -> None:
    """Starts, cancels, closes, posts, peers that read, write, reset and half-close, at random."""
    chance = random.Random(seed)
    pairs = [pair(port, small=True) for _ in range(6)]
    operations: list[an.Operation | None] = []
    completions: list[an.Completion] = []
    left_behind: list[an.AsyncSocket] = []
    posts = 0

    for _ in range(600):
        index = chance.randrange(len(pairs))
        sock, peer = pairs[index]
        peer.setblocking(False)
        action = chance.random()
        if action < 0.2:
            operations.append(sock.recv(chance.choice([1, 100, 65536])))
        elif action < 0.25:
            operations.append(sock.recv(multishot=True))
        elif action < 0.3:
            operations.append(sock.recv_into(bytearray(50)))
        elif action < 0.45:
            operations.append(sock.send(pattern(chance.choice([0, 1, 1000, 200_000]))))
        elif action < 0.5:
            sock.send(pattern(chance.choice([1, 1000, 100_000])), quiet=True)
        elif action < 0.55:
            port.post()
            posts += 1
        elif action < 0.65 and operations:
            victim = chance.choice(operations)
            assert victim is not None
            victim.cancel()
        elif action < 0.66:
            sock.cancel()
        elif action < 0.67:
            operations.append(sock.disconnect())
        elif action < 0.8:
            with contextlib.suppress(OSError):
                peer.send(bytes(chance.choice([1, 5000])))
        elif action < 0.9:
            with contextlib.suppress(OSError):
                peer.recv(chance.choice([1, 100_000]))
        elif action < 0.91:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
        elif action < 0.94:
            ends: list[Callable[[], None]] = [
                sock.close,
                partial(sock.close, flush=True),
                peer.close,
            ]
            chance.choice(ends)()
            left_behind.append(sock)
            pairs[index] = pair(port, small=True)
        else:
            completions += port.dequeue_many(timeout=0)
    for sock in left_behind + [sock for sock, _ in pairs]:
        sock.close()
    completions += drain(port, lambda _: not port.in_flight) + settle(port)
    assert sum(c.kind is an.POST for c in completions) == posts
    failures = [c for c in completions if c.operation is None and c.kind is an.SEND]
    assert all(c.error for c in failures)
    broken = [c for c in failures if not cancelled(c)]  # a cancel may leave the stream whole
    assert len({id(c.socket) for c in broken}) == len(broken), "one for each broken stream"
    mine = [c for c in completions if c.operation is not None and c.kind is not an.POST]
    check_exactly_once(operations, mine)


def test_posts_arrive_once_each(port: an.CompletionPort) -> None:
    for number in range(5000):
        port.post(number)
    assert [c.state for c in drain(port, 5000)] == list(range(5000))
    nothing(port)


def test_completions_are_not_lost_when_nobody_holds_the_operation(port: an.CompletionPort) -> None:
    sock, peer = pair(port, small=True)
    for _ in range(50):
        sock.send(pattern(40_000))
    gc.collect()
    _, completions = pump(port, peer, 2_000_000)
    completions += settle(port)
    assert [c.transferred for c in completions] == [40_000] * 50


def test_connections_are_reported_once_each(port: an.CompletionPort) -> None:
    listener, address = listening(port)
    listener.accept(multishot=True)
    names = [dial(address).getsockname() for _ in range(60)]
    completions = drain(port, 60)
    assert sorted(c.address for c in completions if c.address) == sorted(names)
    for completion in completions:
        assert completion.accepted is not None
        completion.accepted.close()
    nothing(port)


def test_a_connect_that_loses_its_socket_completes_once(port: an.CompletionPort) -> None:
    listener = stdlib_listener()
    operations: list[an.Operation | None] = []
    for _ in range(100):
        sock = an.AsyncSocket()
        port.associate(sock)
        operations.append(sock.connect(listener.getsockname()))
        sock.close()
    check_exactly_once(operations, drain(port, 100) + settle(port))
