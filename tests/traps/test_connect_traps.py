"""Connecting: where the outcome comes from, and connects that wait."""

from __future__ import annotations

import errno
import socket

import asyncio_native as an
import pytest
from support import (
    drain,
    family_number,
    keep,
    nothing,
    one,
    refusing_address,
    settle,
    socket_path,
    stdlib_listener,
)


def connecting(port: an.CompletionPort, family: str) -> an.AsyncSocket:
    sock = an.AsyncSocket(family_number(family))
    port.associate(sock)
    return sock


def fill_backlog(listener: socket.socket) -> list[socket.socket]:
    """Stdlib connections until the listener takes no more."""
    fillers = []
    for _ in range(200):
        filler = keep(socket.socket(listener.family, socket.SOCK_STREAM))
        filler.setblocking(False)
        fillers.append(filler)
        result = filler.connect_ex(listener.getsockname())
        if result == errno.EAGAIN:
            return fillers
        if result in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            try:
                # The three-way handshake on loopback is done when connect returns, or never.
                filler.getpeername()
            except OSError:
                return fillers
    raise AssertionError("the backlog takes everything")


def test_a_connect_to_a_closed_port_completes_with_the_refusal_at_the_first_try(
    port: an.CompletionPort, inet: str
) -> None:
    for _ in range(50):
        with connecting(port, inet) as sock:
            operation = sock.connect(refusing_address(inet))
            assert operation.kind is an.CONNECT
            completion = one(port)
            assert completion.operation is operation
            assert completion.error == errno.ECONNREFUSED
            with pytest.raises(ConnectionRefusedError):
                completion.result()
            assert not operation.pending
            nothing(port, 0)


def test_many_refused_connects_at_once_each_complete_once(
    port: an.CompletionPort, inet: str
) -> None:
    address = refusing_address(inet)
    sockets = [connecting(port, inet) for _ in range(100)]
    operations = {sock.connect(address) for sock in sockets}
    completions = drain(port, 100)
    assert {c.operation for c in completions} == operations
    assert {c.error for c in completions} == {errno.ECONNREFUSED}
    assert settle(port) == []
    for sock in sockets:
        sock.close()


def test_a_connect_that_fails_late_completes_with_the_sockets_error(
    port: an.CompletionPort, inet: str
) -> None:
    """The event only says writable: SO_ERROR says whether it is connected."""
    listener = stdlib_listener(inet, backlog=0)
    fill_backlog(listener)
    with connecting(port, inet) as sock:
        operation = sock.connect(listener.getsockname())
        nothing(port)  # the system drops the request: no room in the backlog
        assert operation.pending
        listener.close()
        completion = one(port)  # refused when the request is repeated, after about 1 s
        assert completion.operation is operation
        assert completion.error == errno.ECONNREFUSED


def test_a_connect_that_succeeds_late_completes_and_the_connection_works(
    port: an.CompletionPort, inet: str
) -> None:
    listener = stdlib_listener(inet, backlog=0)
    fillers = fill_backlog(listener)
    with connecting(port, inet) as sock:
        operation = sock.connect(listener.getsockname())
        nothing(port)
        assert operation.pending
        name = sock.getsockname()[:2]
        for filler in fillers:
            filler.close()
        for _ in range(len(fillers) + 1):
            accepted, address = listener.accept()
            keep(accepted)
            if address[:2] == name:
                break
        else:
            raise AssertionError("the late connection never came")
        completion = one(port)
        assert completion.operation is operation
        completion.result()
        accepted.sendall(b"hello")
        sock.recv()
        assert one(port).data == b"hello"


def test_a_waiting_connect_can_be_cancelled(port: an.CompletionPort, family: str) -> None:
    listener = stdlib_listener(family, backlog=0)
    fill_backlog(listener)
    with connecting(port, family) as sock:
        operation = sock.connect(listener.getsockname())
        nothing(port)
        assert operation.cancel()
        completion = one(port)
        assert completion.operation is operation
        with pytest.raises(an.OperationCancelledError):
            completion.result()
        assert settle(port) == []


def test_an_error_that_the_connect_call_itself_reports_is_a_completion(
    port: an.CompletionPort,
) -> None:
    """TCP to the broadcast address fails in the call and sends nothing."""
    with connecting(port, "ipv4") as sock:
        operation = sock.connect(("255.255.255.255", 9))
        completion = one(port)
        assert completion.operation is operation
        assert completion.error != 0
        with pytest.raises(OSError):
            completion.result()


def test_a_connect_to_a_missing_path_completes_with_not_found(port: an.CompletionPort) -> None:
    with connecting(port, "unix") as sock:
        operation = sock.connect(socket_path())
        completion = one(port)
        assert completion.operation is operation
        with pytest.raises(FileNotFoundError):
            completion.result()


def test_a_connect_to_a_full_unix_backlog_waits_for_room(port: an.CompletionPort) -> None:
    """The system answers EAGAIN, and no event ever tells that there is room."""
    listener = stdlib_listener("unix", backlog=0)
    fillers = fill_backlog(listener)
    with connecting(port, "unix") as sock:
        operation = sock.connect(listener.getsockname())
        nothing(port, 0.2)
        assert operation.pending
        for _ in range(len(fillers)):
            keep(listener.accept()[0])
            if (completion := port.dequeue(1.0)) is not None:
                break
        else:
            raise AssertionError("there was room, and the connect did not take it")
        assert completion.operation is operation
        completion.result()
        sock.send(b"in", quiet=True)
        accepted = keep(listener.accept()[0])
        while accepted.recv(2) != b"in":
            accepted = keep(listener.accept()[0])


def test_all_connects_that_wait_for_a_full_unix_backlog_get_in(port: an.CompletionPort) -> None:
    listener = stdlib_listener("unix", backlog=0)
    fillers = fill_backlog(listener)
    sockets = [connecting(port, "unix") for _ in range(10)]
    operations = {sock.connect(listener.getsockname()) for sock in sockets}
    nothing(port, 0.1)
    listener.setblocking(False)

    def accept_while_waiting(so_far: list[an.Completion]) -> bool:
        try:
            keep(listener.accept()[0])
        except BlockingIOError:
            pass
        return len(so_far) >= 10

    completions = drain(port, accept_while_waiting)
    assert fillers
    assert {c.operation for c in completions} == operations
    assert [c.error for c in completions] == [0] * 10
    for sock in sockets:
        sock.close()


def test_a_connect_that_waits_for_a_unix_backlog_hears_that_the_listener_is_gone(
    port: an.CompletionPort,
) -> None:
    listener = stdlib_listener("unix", backlog=0)
    address = listener.getsockname()
    fill_backlog(listener)
    with connecting(port, "unix") as sock:
        operation = sock.connect(address)
        nothing(port, 0.1)
        listener.close()
        completion = one(port)
        assert completion.operation is operation
        assert completion.error == errno.ECONNREFUSED


def test_closing_a_waiting_connect_completes_it_once(port: an.CompletionPort, family: str) -> None:
    listener = stdlib_listener(family, backlog=0)
    fill_backlog(listener)
    sock = connecting(port, family)
    operation = sock.connect(listener.getsockname())
    nothing(port)
    sock.close()
    completion = one(port)
    assert completion.operation is operation
    assert completion.error == errno.ECANCELED
    listener.close()
    nothing(port, 0.2)
