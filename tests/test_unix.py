"""What is particular to AF_UNIX."""

from __future__ import annotations

import array
import errno
import os
import socket
import sys
import threading
import time
from pathlib import Path

import asyncio_native as an
import pytest
from support import (
    cancelled,
    drain,
    keep,
    listening,
    nothing,
    one,
    pair,
    settle,
    socket_path,
    stdlib_listener,
)

pytestmark = pytest.mark.unix


def connecting(port: an.CompletionPort, path: str) -> tuple[an.AsyncSocket, an.Operation]:
    sock = an.AsyncSocket(socket.AF_UNIX)
    port.associate(sock)
    return sock, sock.connect(path)


def full_backlog(port: an.CompletionPort) -> tuple[socket.socket, list[an.Operation]]:
    """A listener that accepts nothing, and connects of which the last ones wait for room."""
    if not sys.platform.startswith("linux"):
        pytest.skip("Linux alone says EAGAIN of a full backlog; other systems refuse")
    listener = stdlib_listener("unix", backlog=1)
    operations = [connecting(port, listener.getsockname())[1] for _ in range(8)]
    return listener, operations


def test_connect_to_a_path(port: an.CompletionPort) -> None:
    listener = stdlib_listener("unix")
    sock, _ = connecting(port, listener.getsockname())
    assert one(port).result() is None
    peer = keep(listener.accept()[0])
    sock.send(b"x", quiet=True)
    assert peer.recv(1) == b"x"


def test_connect_to_a_missing_path_fails(port: an.CompletionPort) -> None:
    connecting(port, socket_path())
    with pytest.raises(FileNotFoundError):
        one(port).result()


def test_connect_to_a_path_where_nobody_listens_is_refused(port: an.CompletionPort) -> None:
    listener = stdlib_listener("unix")
    path = listener.getsockname()
    listener.close()
    connecting(port, path)
    with pytest.raises(ConnectionRefusedError):
        one(port).result()


def test_connect_to_a_socket_of_another_type_fails(port: an.CompletionPort) -> None:
    path = socket_path()
    keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(path)
    connecting(port, path)
    assert one(port).error == errno.EPROTOTYPE


def test_connect_to_a_full_backlog_waits_for_room(port: an.CompletionPort) -> None:
    listener, operations = full_backlog(port)
    completions = settle(port, 0.3)
    assert all(c.result() is None for c in completions)
    assert len(completions) < len(operations), "the backlog never filled"
    for _ in operations:
        keep(listener.accept()[0])
        if len(completions) < len(operations):
            completions.append(one(port))
    assert {c.operation for c in completions} == set(operations)
    assert all(c.result() is None for c in completions)


def test_connect_to_a_full_backlog_works_under_a_wait_for_ever(port: an.CompletionPort) -> None:
    listener, operations = full_backlog(port)

    def accept_all() -> None:
        for _ in operations:
            keep(listener.accept()[0])

    thread = threading.Timer(0.2, accept_all)
    thread.start()
    for _ in operations:
        completion = port.dequeue()
        assert completion is not None
        assert completion.result() is None
    thread.join()


def test_a_connect_that_waits_for_room_can_be_cancelled(port: an.CompletionPort) -> None:
    _, operations = full_backlog(port)
    settle(port, 0.2)
    waiting = [operation for operation in operations if operation.pending]
    assert waiting
    for operation in waiting:
        assert operation.cancel()
    completions = drain(port, len(waiting))
    assert all(cancelled(c) for c in completions)
    assert {c.operation for c in completions} == set(waiting)


def test_a_connect_that_waits_for_room_ends_with_close(port: an.CompletionPort) -> None:
    _, operations = full_backlog(port)
    settle(port, 0.2)
    waiting = [operation for operation in operations if operation.pending]
    assert waiting
    for operation in waiting:
        assert operation.socket is not None
        operation.socket.close()
    assert all(cancelled(c) for c in drain(port, len(waiting)))


def test_a_connect_that_waits_for_room_learns_that_the_listener_went(
    port: an.CompletionPort,
) -> None:
    listener, operations = full_backlog(port)
    settle(port, 0.2)
    waiting = [operation for operation in operations if operation.pending]
    assert waiting
    listener.close()
    for completion in drain(port, len(waiting)):
        with pytest.raises(ConnectionError):
            completion.result()


def test_a_full_backlog_does_not_keep_the_processor_busy(port: an.CompletionPort) -> None:
    full_backlog(port)
    settle(port, 0.2)
    before = time.process_time()
    nothing(port, 1.0)
    assert time.process_time() - before < 0.3


def test_close_leaves_the_path(port: an.CompletionPort) -> None:
    listener, path = listening(port, "unix")
    listener.close()
    assert Path(path).exists(), "as in the stdlib: the path is its maker's to remove"


def test_a_bind_to_a_taken_path_raises(port: an.CompletionPort) -> None:
    _, path = listening(port, "unix")
    with an.AsyncSocket(socket.AF_UNIX) as sock, pytest.raises(OSError) as caught:
        sock.bind(path)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_peer_that_closes_with_data_unread_is_a_reset_or_an_end(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix")
    sock.recv()
    sock.send(b"never read", quiet=True)
    peer.close()
    completion = one(port)
    assert completion.data == b"" or completion.error == errno.ECONNRESET


def test_data_sent_before_the_peer_closed_comes_first(port: an.CompletionPort) -> None:
    sock, peer = pair(port, "unix")
    peer.sendall(b"last words")
    peer.close()
    sock.recv(multishot=True)
    first, second = drain(port, 2)
    assert first.data == b"last words"
    assert second.data == b""
    assert not second.more


def test_passed_descriptors_do_not_disturb_the_data(port: an.CompletionPort) -> None:
    """Descriptors come as ancillary data, which ends a read early; the rest must still come."""
    sock, peer = pair(port, "unix")
    sock.recv(multishot=True)
    read_end, write_end = os.pipe()
    try:
        sent = b""
        for number in range(10):
            plain, carrying = b"plain%d" % number, b"carrying%d" % number
            peer.sendall(plain)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read_end]))
            peer.sendmsg([carrying], [rights])
            sent += plain + carrying
        found = drain(port, lambda got: len(b"".join(c.data or b"" for c in got)) >= len(sent))
        assert b"".join(c.data or b"" for c in found) == sent
        peer.sendall(b"and on")
        assert one(port).data == b"and on"
    finally:
        os.close(read_end)
        os.close(write_end)
