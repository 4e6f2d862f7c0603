"""``asyncio-native proxy``: forwards TCP connections; fit to stand in front of a database.

One port, one thread. A connection is two ends, the client's and the target's. What is received at
one goes out at the other by a quiet send, which costs no completion.

Short messages are received by a multishot, which is the cheapest. A multishot reads ahead of
`dequeue`, though, so what comes in bulk or meets a slow reader is received once at a time, and the
next receive waits until the system has taken all that came before: the rest stays in the kernel,
whose window slows the sender down. So a connection holds `BULK_BYTES` each way at most.

How a connection ends is passed on as it happened: the end of one direction as the end of that
direction, a reset as a reset.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import asyncio_native as an

from .common import (
    PROGRAM,
    CommandError,
    Subparsers,
    add_backend_argument,
    choose_backend,
    error_text,
    seconds,
    tell,
    whole_number,
)
from .echo import BACKLOG, format_address
from .system import advice, raise_descriptor_limit

SHORT_BYTES = 16_384
"""What a receive of the multishot takes at most; one that is full tells that more is coming."""

BULK_BYTES = 65_536
"""What a single receive takes at most. Four times as much is faster by a half on loopback, and
costs four times the memory for each slow reader."""

ACCEPTS = 16
"""Clients taken in one turn of the loop, which with thousands of connections is a long one on poll;
each keeps a descriptor."""

ACCEPT_AGAIN_SECONDS = 0.1
"""Out of descriptors: another process may give some back, which no event tells."""

RESET = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)
"""SO_LINGER with a time of zero: closing resets the connection (RFC 9293, ABORT)."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accepting that pass when others give something back."""

ACCEPT_FAILED = "accepting a connection failed"
CONNECT_FAILED = "connecting to the target failed"

STOP = object()
"""What is posted to end `Proxy.run`."""

TELL_STATISTICS = object()
"""What is posted for the statistics on standard error."""


class Place(NamedTuple):
    """HOST:PORT as the user wrote it, an IPv6 host without its brackets."""

    host: str
    port: int


Resolved = tuple[int, tuple[Any, ...]]
"""An address family and a numeric address, as `socket.socket.bind` takes it."""


class End:
    """One end of a connection; its socket's `state` is this object."""

    __slots__ = ("broken", "connection", "ended", "multishot", "other", "received", "socket")

    other: End
    multishot: an.Operation | None

    def __init__(self, connection: Connection, sock: an.AsyncSocket) -> None:
        self.connection = connection
        self.socket = sock
        self.multishot = None  # what receives; None while single receives do
        self.received = 0  # bytes
        self.ended = False  # its peer sends nothing more: the end of the stream was received
        self.broken = False  # a send failed: its peer takes nothing more


class Connection:
    """A client, and the target that it is connected with."""

    __slots__ = ("active", "attempts", "client", "closed", "finished", "target", "timer")

    def __init__(self, client: an.AsyncSocket, target: an.AsyncSocket) -> None:
        self.client = End(self, client)
        self.target = End(self, target)
        self.client.other = self.target
        self.target.other = self.client
        self.attempts = 0  # addresses of the target that did not answer
        self.finished = 0  # directions that have come to their end, and have passed it on
        self.closed = False
        self.active = 0.0  # when something was received last, in seconds of the monotonic clock
        self.timer: an.Operation | None = None


class Proxy:
    """A forwarder on a completion port of its own; it listens when the constructor returns.

    targets: the addresses of the target, tried one after the other for each connection.
    idle_seconds: a connection is closed after that time without a byte either way; None for never.
    connect_seconds: how long each address may take to answer.
    Raises `OSError` if the address to listen on cannot be had.
    """

    def __init__(
        self,
        listen: Resolved,
        targets: list[Resolved],
        backend: str,
        idle_seconds: float | None,
        connect_seconds: float,
    ) -> None:
        self._targets = targets
        self._idle_seconds = idle_seconds
        self._connect_seconds = connect_seconds
        self._began = self._now = time.monotonic()
        self._connections: set[Connection] = set()
        self._reported: set[tuple[str, int | None]] = set()
        # Counts for the statistics; the bytes of open connections are in their ends.
        self._connections_total = 0
        self._connects_failed = 0
        self._idle_closed = 0
        self._bytes_from_clients = 0
        self._bytes_from_target = 0
        self._accepts = ACCEPTS  # wanted in flight
        self._accepting = 0  # in flight
        self._spares: list[an.AsyncSocket] = []  # not yet connected to the target
        self._port = an.CompletionPort(backend, concurrency=1)
        try:
            self._listener = self._listen(*listen)
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

    def tell_statistics(self) -> None:
        """Has `run` print the statistics; from any thread, and from a signal handler."""
        self._port.post(TELL_STATISTICS)

    def close(self) -> None:
        """Closes the listener and all connections at once."""
        self._port.close()
        for spare in self._spares:
            spare.close()

    def run(self) -> None:
        """Forwards until `stop` is called. Raises `OSError` if accepting has ended for good."""
        dequeue_many = self._port.dequeue_many
        self._accept()
        while True:
            completions = dequeue_many()
            self._now = time.monotonic()
            for completion in completions:
                if completion.kind is an.RECV and completion.data:
                    self._forward(completion.state, completion.data, completion.more)
                elif completion.kind is an.POST:
                    if completion.state is STOP:
                        return
                    tell(self.statistics_text())
                elif completion.kind is an.ACCEPT:
                    self._accepted(completion)
                elif completion.kind is an.TIMER:
                    self._timer_fired(completion.state)
                elif completion.state is not None and not completion.state.connection.closed:
                    self._progressed(completion.state, completion)

    # -- accepting and connecting -----------------------------------------------------------------

    def _accept(self) -> None:
        """Keeps accepts in flight, for each of which there is a socket to the target already.

        So nobody is accepted who could not be served: out of descriptors, clients wait in the
        listener's backlog until a connection ends.
        """
        while self._accepting < self._accepts:
            try:
                while len(self._spares) <= self._accepting:
                    self._spares.append(an.AsyncSocket(self._targets[0][0], socket.SOCK_STREAM))
            except OSError as error:
                self._out_of_descriptors(error.errno)
                if not self._accepting:
                    self._port.timer(ACCEPT_AGAIN_SECONDS)
                return
            self._listener.accept()
            self._accepting += 1

    def _out_of_descriptors(self, error: int | None) -> None:
        """From now on one accept at a time: the sockets for more would be missing elsewhere."""
        self._report(ACCEPT_FAILED, error)
        if self._accepts > 1:
            self._accepts = 1
            while len(self._spares) > 1:
                self._spares.pop().close()
            self._listener.cancel()

    def _accepted(self, completion: an.Completion) -> None:
        self._accepting -= 1
        if completion.accepted is not None:
            self._begin(completion.accepted)
        elif completion.error in EXHAUSTED:  # the port knows when to try again
            self._out_of_descriptors(completion.error)
        else:
            with contextlib.suppress(an.OperationCancelledError):
                completion.result()
        self._accept()

    def _begin(self, client: an.AsyncSocket) -> None:
        try:
            target = self._spares.pop() if self._spares else an.AsyncSocket(self._targets[0][0])
        except OSError as error:  # the spare ones were given up while this client was accepted
            self._report(CONNECT_FAILED, error.errno)
            self._connects_failed += 1
            client.close()
            return
        connection = Connection(client, target)
        self._connections.add(connection)
        self._connections_total += 1
        self._connect(connection)

    def _connect(self, connection: Connection) -> None:
        """Starts to connect to the target's first or next address."""
        family, address = self._targets[connection.attempts]
        client, target = connection.client, connection.target
        try:
            if connection.attempts:
                target.socket.close()
                target.socket = an.AsyncSocket(family, socket.SOCK_STREAM)
            else:
                self._prepare(client)
            self._prepare(target)
            target.socket.connect(address, timeout=self._connect_seconds)
        except OSError as error:
            self._connects_failed += 1
            self._report(CONNECT_FAILED, error.errno)
            self._close(connection, reset=True)

    def _prepare(self, end: End) -> None:
        self._port.associate(end.socket, end)
        end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose machine died without a word is noticed at last, also without --idle-timeout.
        end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _connected(self, connection: Connection, error: int) -> None:
        if not error:
            connection.active = self._now
            self._receive(connection.target, multishot=True)
            self._receive(connection.client, multishot=True)
            if self._idle_seconds is not None:
                connection.timer = self._port.timer(self._idle_seconds, connection)
            return
        connection.attempts += 1
        if connection.attempts < len(self._targets):
            self._connect(connection)
            return
        self._connects_failed += 1
        self._report(CONNECT_FAILED, error)
        self._close(connection, reset=True)

    # -- forwarding -------------------------------------------------------------------------------

    def _forward(self, end: End, data: bytes, more: bool) -> None:
        """Sends on what was received. more: the multishot that received it is still armed."""
        connection = end.connection
        if connection.closed:
            return
        size = len(data)
        end.received += size
        connection.active = self._now
        sink = end.other.socket
        sink.send(data, quiet=True)
        if not more:
            self._receive(end, multishot=size < SHORT_BYTES)
        elif (size == SHORT_BYTES or sink.unsent) and end.multishot is not None:
            end.multishot.cancel()  # its last completion comes after what was read ahead

    def _receive(self, end: End, *, multishot: bool) -> None:
        """Receives again, once the other end has handed over all that came before."""
        sink = end.other.socket
        end.multishot = None
        if sink.unsent:
            sink.send(b"")  # completes when all before it was handed over
        elif multishot:
            end.multishot = end.socket.recv(SHORT_BYTES, multishot=True)
        else:
            end.socket.recv(BULK_BYTES)

    def _progressed(self, end: End, completion: an.Completion) -> None:
        """What happens on the socket of `end`, apart from data."""
        kind = completion.kind
        connection = end.connection
        if kind is an.CONNECT:
            self._connected(connection, completion.error)
        elif kind is an.RECV:
            self._received_last(end, completion)
        elif completion.error:
            # What its peer had sent before it broke off may still be there: it is passed on, and
            # receiving comes to the failure after it; if anything is going to be received.
            end.broken = True
            if end.ended or end.other.broken:
                self._close(connection, reset=True)
        elif kind is an.SEND:
            self._receive(end.other, multishot=False)
        else:  # disconnected: this direction is done
            connection.finished += 1
            if connection.finished == 2:
                self._close(connection)

    def _received_last(self, end: End, completion: an.Completion) -> None:
        """The end of a receive that brought no data."""
        try:
            completion.result()
        except an.OperationCancelledError:
            self._receive(end, multishot=False)
        except OSError:
            self._close(end.connection, reset=True)
        else:
            if end.broken:
                self._close(end.connection, reset=True)
            else:
                end.ended = True
                end.other.socket.disconnect()

    def _close(self, connection: Connection, *, reset: bool = False) -> None:
        connection.closed = True
        self._connections.discard(connection)
        self._bytes_from_clients += connection.client.received
        self._bytes_from_target += connection.target.received
        if connection.timer is not None:
            connection.timer.cancel()
        for end in (connection.client, connection.target):
            if reset:
                with contextlib.suppress(OSError):
                    end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.socket.close()
            # What still comes asks whether the connection is closed, and no more: without a cycle
            # memory does not wait for the garbage collector, which is late without the lock.
            end.multishot = None
            del end.socket, end.other
        connection.timer = None
        del connection.client, connection.target

    def _timer_fired(self, connection: Connection | None) -> None:
        if connection is None:
            self._accept()
        elif not connection.closed and self._idle_seconds is not None:
            self._check_idle(connection, self._idle_seconds)

    def _check_idle(self, connection: Connection, idle_seconds: float) -> None:
        """Closes the connection if it is idle, else comes back when it may be.

        So a message costs no more than to note the time.
        """
        left = connection.active + idle_seconds - self._now
        if left > 0:
            connection.timer = self._port.timer(left, connection)
        else:
            self._idle_closed += 1
            unsent = connection.client.socket.unsent + connection.target.socket.unsent
            self._close(connection, reset=unsent > 0)  # what is cut off is no orderly end

    # -- telling ----------------------------------------------------------------------------------

    def statistics_text(self) -> str:
        """What it has done so far, a block of lines."""
        from_clients = self._bytes_from_clients + sum(c.client.received for c in self._connections)
        from_target = self._bytes_from_target + sum(c.target.received for c in self._connections)
        return (
            f"proxy statistics ({self._port.backend})\n"
            f"  uptime              {time.monotonic() - self._began:.1f} s\n"
            f"  connections now     {len(self._connections)}\n"
            f"  connections total   {self._connections_total}\n"
            f"  connects failed     {self._connects_failed}\n"
            f"  closed as idle      {self._idle_closed}\n"
            f"  bytes from clients  {from_clients}\n"
            f"  bytes from target   {from_target}"
        )

    def _report(self, what: str, number: int | None) -> None:
        """Says what failed, once for each kind of error; the statistics count them."""
        if (what, number) in self._reported:
            return
        self._reported.add((what, number))
        hint = advice(number or 0)
        tell(
            f"{PROGRAM}: {what}, the proxy goes on: {os.strerror(number or 0)}"
            + (f" ({hint})" if hint else "")
        )


def add_parser(subparsers: Subparsers) -> None:
    """Declares the command's arguments."""
    parser = subparsers.add_parser(
        "proxy",
        help="forward TCP connections to another server",
        description="Forwards TCP connections until SIGINT (Ctrl-C) or SIGTERM. The first line on "
        "standard output is 'listening on HOST:PORT'. SIGUSR1, on Windows Ctrl-Break, prints "
        "statistics to standard error. Names are resolved once, at the start.",
    )
    parser.add_argument(
        "listen",
        type=place(0),
        metavar="LISTEN_HOST:PORT",
        help="where to listen; port 0 lets the system choose, an IPv6 host stands in brackets",
    )
    parser.add_argument(
        "target", type=place(1), metavar="TARGET_HOST:PORT", help="where to forward to"
    )
    add_backend_argument(parser)
    parser.add_argument(
        "--idle-timeout",
        type=seconds(0.1, 31_536_000),
        metavar="SECONDS",
        help="close a connection after that time without a byte either way (default: never)",
    )
    parser.add_argument(
        "--connect-timeout",
        type=seconds(0.1, 3_600),
        default=10.0,
        metavar="SECONDS",
        help="for the target to answer, for each of its addresses (default: %(default)g)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Forwards until a signal asks it to end."""
    backend = choose_backend(arguments.backend)
    raise_descriptor_limit()
    targets = resolve(arguments.target)
    listen = resolve(arguments.listen, socket.AI_PASSIVE)[0]
    try:
        proxy = Proxy(listen, targets, backend, arguments.idle_timeout, arguments.connect_timeout)
    except OSError as error:
        where = format_address(arguments.listen)
        raise CommandError(f"cannot listen on {where}: {error_text(error)}") from None
    try:
        with _signals(proxy):
            print(f"listening on {format_address(proxy.address)}", flush=True)
            proxy.run()
    finally:
        proxy.close()
    return 0


def place(lowest_port: int) -> Callable[[str], Place]:
    """A type for argparse: HOST:PORT, an IPv6 host in brackets."""

    def convert(text: str) -> Place:
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise argparse.ArgumentTypeError(f"an IPv6 host stands in brackets: {text!r}")
        if not (colon and host and port):
            raise argparse.ArgumentTypeError(f"not HOST:PORT: {text!r}")
        return Place(host, whole_number(lowest_port, 65_535)(port))

    return convert


def resolve(wanted: Place, flags: int = 0) -> list[Resolved]:
    """The numeric addresses of a host, in the system's order of preference."""
    try:
        found = socket.getaddrinfo(
            wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=flags | socket.AI_NUMERICSERV
        )
    except UnicodeError:  # what the name codec cannot take: an empty or overlong label
        raise CommandError(f"{wanted.host}: not a host name") from None
    except OSError as error:
        raise CommandError(f"{wanted.host}: {error_text(error)}") from None
    return [(family, address) for family, _, _, _, address in found]


@contextlib.contextmanager
def _signals(proxy: Proxy) -> Iterator[None]:
    """Within it SIGINT and SIGTERM end the proxy; SIGUSR1, or Ctrl-Break, prints its statistics."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        proxy.stop()

    def tell(_number: int, _frame: FrameType | None) -> None:
        proxy.tell_statistics()

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if sys.platform == "win32":
        handlers[signal.SIGBREAK] = tell
    else:
        handlers[signal.SIGUSR1] = tell
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
