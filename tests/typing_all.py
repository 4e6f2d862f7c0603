"""All of the API in typed form; `mypy --strict` must pass on it (see test_typing.py).

`assert_type` states what a user gets without a cast. The module is checked, never run."""

from __future__ import annotations

import array
import socket
from pathlib import Path
from typing import Any, assert_type

import asyncio_native as an
from asyncio_native import (
    ACCEPT,
    CONNECT,
    DISCONNECT,
    POST,
    RECV,
    RECVFROM,
    SEND,
    SENDFILE,
    SENDTO,
    TIMER,
    AsyncSocket,
    BackendUnavailableError,
    Completion,
    CompletionPort,
    Operation,
    OperationCancelledError,
    OperationKind,
    PortClosedError,
)


class Session:
    """A user's state."""

    received = 0


def ports() -> None:
    for backend in an.backends():
        assert_type(backend.name, str)
        assert_type(backend.available, bool)
        print(backend.name, "works" if backend.available else backend.reason)
    try:
        port = CompletionPort("epoll", concurrency=1)
    except BackendUnavailableError as error:
        raise SystemExit(str(error)) from error
    with port as same:
        assert_type(same, CompletionPort)
        assert_type(port.backend, str)
        assert_type(port.in_flight, int)
        assert_type(port.fileno(), int)
        port.post()
        port.post(Session())
        assert_type(port.timer(1.5), Operation)
        assert_type(port.timer(2, Session()), Operation)
        assert_type(port.dequeue(), Completion | None)
        assert_type(port.dequeue(0.5), Completion | None)
        assert_type(port.dequeue(timeout=None), Completion | None)
        assert_type(port.dequeue_many(), list[Completion])
        assert_type(port.dequeue_many(10, 1), list[Completion])
        assert_type(port.dequeue_many(max_count=10, timeout=1.0), list[Completion])
        print(port.statistics(), AsyncSocket().statistics().bytes_received)
    port.close()
    assert_type(an.get_include(), str)
    assert_type(an.__version__, str)


def sockets(port: CompletionPort) -> None:
    listener = AsyncSocket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\0" * 8)
    assert_type(listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR), int)
    assert_type(listener.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8), bytes)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.listen(100)
    listener.listen(backlog=100)
    host, number = listener.getsockname()
    print(host, number)
    port.associate(listener)
    port.associate(listener, Session())
    port.associate(listener, state=None)
    assert_type(listener.fileno(), int)
    assert_type(listener.closed, bool)
    assert_type(listener.unsent, int)
    assert_type(listener.port, CompletionPort | None)
    print(listener.family, listener.type, listener.proto, listener.state)
    listener.close()
    listener.close(flush=True)

    six = AsyncSocket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_UDP)
    six.bind(("::1", 0, 0, 0))
    unix = AsyncSocket(family=socket.AF_UNIX, type=socket.SOCK_STREAM, proto=0)
    unix.bind("/tmp/path")
    unix.bind(b"\0abstract")
    unix.shutdown(socket.SHUT_WR)
    with AsyncSocket.adopt(socket.socket()) as adopted:
        assert_type(adopted, AsyncSocket)
        print(adopted.getpeername())
        assert_type(adopted.detach(), socket.socket)
    AsyncSocket.adopt(5).close()


def operations(sock: AsyncSocket, file: Path) -> None:
    assert_type(sock.accept(), Operation)
    assert_type(sock.accept(multishot=True, timeout=5), Operation)
    assert_type(sock.connect(("127.0.0.1", 80), timeout=0.5), Operation)
    assert_type(sock.connect(("::1", 80, 0, 0)), Operation)
    assert_type(sock.connect("/tmp/path"), Operation)
    assert_type(sock.recv(), Operation)
    assert_type(sock.recv(100, multishot=True, pause_above=1 << 20, timeout=60), Operation)
    assert_type(sock.recv_into(bytearray(10), timeout=1), Operation)
    assert_type(sock.recv_into(memoryview(bytearray(10))), Operation)
    assert_type(sock.recv_into(array.array("B", [0])), Operation)
    assert_type(sock.recvfrom(), Operation)
    assert_type(sock.recvfrom(100, multishot=True, timeout=1), Operation)
    assert_type(sock.recvfrom_into(bytearray(10), timeout=1), Operation)
    assert_type(sock.send(b"x"), Operation)
    assert_type(sock.send(bytearray(b"x"), timeout=1), Operation)
    assert_type(sock.send(memoryview(b"x"), quiet=False), Operation)
    assert_type(sock.sendv([b"x", bytearray(b"y"), memoryview(b"z")], timeout=1), Operation)
    assert_type(sock.sendto(b"x", ("127.0.0.1", 80), timeout=1), Operation)
    sock.send(b"x", quiet=True, timeout=1)
    sock.sendv((b"x", b"y"), quiet=True)
    sock.sendto(b"x", "/tmp/path", quiet=True)
    with open(file, "rb") as opened:
        assert_type(sock.sendfile(opened), Operation)
        assert_type(sock.sendfile(opened, 10, 20), Operation)
        assert_type(sock.sendfile(opened, offset=10, count=None, timeout=1), Operation)
    assert_type(sock.disconnect(timeout=1), Operation)
    assert_type(sock.cancel(), int)

    operation = sock.recv(multishot=True)
    assert_type(operation.kind, OperationKind)
    assert_type(operation.pending, bool)
    assert_type(operation.socket, AsyncSocket | Any)
    assert_type(operation.cancel(), bool)
    operation.pause()
    operation.resume()


def completions(port: CompletionPort) -> None:
    for c in port.dequeue_many():
        assert_type(c.operation, Operation | None)
        assert_type(c.kind, OperationKind)
        assert_type(c.socket, AsyncSocket | Any)
        assert_type(c.error, int)
        assert_type(c.transferred, int)
        assert_type(c.data, bytes | Any)
        assert_type(c.accepted, AsyncSocket | None)
        assert_type(c.truncated, bool)
        assert_type(c.more, bool)
        print(c.state, c.address)
        try:
            result: Any = c.result()
        except OperationCancelledError:
            continue
        except PortClosedError as error:
            print(error.errno)
            break
        print(result)
    names: dict[OperationKind, str] = {
        ACCEPT: "accept",
        CONNECT: "connect",
        RECV: "recv",
        RECVFROM: "recvfrom",
        SEND: "send",
        SENDTO: "sendto",
        SENDFILE: "sendfile",
        DISCONNECT: "disconnect",
        POST: "post",
        TIMER: "timer",
    }
    print(names[OperationKind.RECV], names[an.RECV], int(OperationKind["SEND"]))


def echo_server(port: CompletionPort) -> None:
    """The example of the documentation, as a user types it."""
    while True:
        for c in port.dequeue_many(timeout=1.0):
            if c.kind is an.RECV and c.data:
                c.socket.send(c.data, quiet=True)
            elif c.kind is an.RECV:
                c.socket.close(flush=True)
            elif c.kind is an.ACCEPT and c.accepted:
                port.associate(c.accepted, state=Session())
                c.accepted.recv(multishot=True, pause_above=1 << 20)
            elif c.error:
                print(c)
