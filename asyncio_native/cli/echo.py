"""``asyncio-native echo``: a server that sends back what it receives.

It is also the server that ``c10k`` measures, so `EchoServer` is kept as plain as the example in the
documentation: one port, one thread, multishot accept and receive, quiet sends.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import asyncio_native as an

from .common import (
    PROGRAM,
    CommandError,
    Subparsers,
    UsageError,
    add_backend_argument,
    choose_backend,
    error_text,
    tell,
    whole_number,
)
from .system import advice, raise_descriptor_limit

RECEIVE_BYTES = 262_144
"""On loopback and fast networks one receive of 256 KiB moves twice what four of 64 KiB do."""

UNSENT_LIMIT_BYTES = 1 << 20
"""A client that sends and never reads costs this much: then nothing more is received from it."""

BACKLOG = 65_535
"""The system cuts this to what it allows (Linux: net.core.somaxconn)."""

STOP = object()
"""What is posted to end `EchoServer.run`."""


class EchoServer:
    """An echo server on a completion port of its own; it listens when the constructor returns.

    address: a numeric address as `socket.socket.bind` takes it.
    on_accept: called with each connection, in the thread that runs the server.
    Raises `OSError` if the address cannot be had.
    """

    def __init__(
        self,
        family: int,
        address: tuple[Any, ...],
        backend: str,
        on_accept: Callable[[], None] | None = None,
    ) -> None:
        self._on_accept = on_accept
        self._reported: set[int] = set()
        self._port = an.CompletionPort(backend, concurrency=1)
        try:
            self._listener = self._listen(family, address)
        except BaseException:
            self._port.close()
            raise

    def _listen(self, family: int, address: tuple[Any, ...]) -> an.AsyncSocket:
        listener = an.AsyncSocket(family, socket.SOCK_STREAM)
        try:
            if sys.platform == "win32":  # there SO_REUSEADDR would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            self._port.associate(listener)
            listener.accept(multishot=True)
        except BaseException:
            listener.close()
            raise
        return listener

    @property
    def address(self) -> tuple[Any, ...]:
        """Where it listens, with the port that the system chose if 0 was asked for."""
        name: tuple[Any, ...] = self._listener.getsockname()
        return name

    def stop(self) -> None:
        """Ends `run`; from any thread, and from a signal handler."""
        self._port.post(STOP)

    def close(self) -> None:
        """Closes the listener and all connections at once."""
        self._port.close()

    def run(self) -> None:
        """Serves until `stop` is called. Raises `OSError` if accepting has ended for good."""
        dequeue_many = self._port.dequeue_many
        while True:
            for completion in dequeue_many():
                kind = completion.kind
                if kind is an.RECV:
                    connection = completion.socket
                    data = completion.data
                    if data:
                        try:
                            connection.send(data, quiet=True)
                        except OSError:  # closed because of a failure earlier in this batch
                            connection.close()
                    elif completion.error:
                        connection.close()
                    else:  # the peer may still read: it gets its whole reply before the end
                        connection.close(flush=True)
                elif kind is an.ACCEPT:
                    self._accepted(completion)
                elif kind is an.POST:
                    return
                elif completion.socket is not None:  # a quiet send failed: the peer is gone
                    completion.socket.close()

    def _accepted(self, completion: an.Completion) -> None:
        connection = completion.accepted
        if connection is None:
            self._accept_failed(completion)
            return
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._port.associate(connection)
            connection.recv(RECEIVE_BYTES, multishot=True, pause_above=UNSENT_LIMIT_BYTES)
        except OSError as error:
            connection.close()
            self._report(error)
            return
        if self._on_accept is not None:
            self._on_accept()

    def _accept_failed(self, completion: an.Completion) -> None:
        """Goes on as long as accepting does; raises the error if it has ended."""
        try:
            completion.result()
        except OSError as error:
            if not completion.more:
                raise
            self._report(error)

    def _report(self, error: OSError) -> None:
        """Says that a connection could not be taken, once for each kind of error."""
        number = error.errno or 0
        if number in self._reported:
            return
        self._reported.add(number)
        hint = advice(number)
        tell(
            f"{PROGRAM}: accepting a connection failed, the server goes on: {error_text(error)}"
            + (f" ({hint})" if hint else "")
        )


def add_parser(subparsers: Subparsers) -> None:
    """Declares the command's arguments."""
    parser = subparsers.add_parser(
        "echo",
        help="run an echo server",
        description="Sends back what it receives until SIGINT (Ctrl-C) or SIGTERM. The first line "
        "on standard output is 'listening on HOST:PORT'.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address or name to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65_535),
        default=5555,
        help="TCP port, 0 lets the system choose (default: %(default)s)",
    )
    add_backend_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal asks it to end."""
    backend = choose_backend(arguments.backend)
    raise_descriptor_limit()
    family, address = _resolve(arguments.host, arguments.port)
    try:
        server = EchoServer(family, address, backend)
    except OSError as error:
        where = format_address((arguments.host, arguments.port))
        raise CommandError(f"cannot listen on {where}: {error_text(error)}") from None
    try:
        with _signals_call(server.stop):
            print(f"listening on {format_address(server.address)}", flush=True)
            server.run()
    finally:
        server.close()
    return 0


def format_address(address: tuple[Any, ...]) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolve(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """The family and numeric address of what the user named; ``[::1]`` is taken as ``::1``."""
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not name:
        raise UsageError("argument --host: must not be empty")
    try:
        found = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except UnicodeError:  # what the name codec cannot take: an empty or overlong label
        raise CommandError(f"cannot listen on {host}: not a host name") from None
    except OSError as error:
        raise CommandError(f"cannot listen on {host}: {error_text(error)}") from None
    family, _, _, _, address = found[0]
    return family, address


@contextlib.contextmanager
def _signals_call(function: Callable[[], None]) -> Iterator[None]:
    """Within it SIGINT and SIGTERM call `function` (on the main thread) and do nothing else."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        function()

    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
