"""The server on asyncio, or on a loop that takes its place, as its user would write it.

    loop_server.py [loop=asyncio] [role=echo] [busy=0] [port=0]

`loop` is `asyncio`, `aiofastnet` (over uvloop), or the module whose `new_event_loop` makes it:
`uvloop`, `blazio`, `zloop`, `rloop`. Everything is written with protocols and transports, the
fastest way that these loops have. Prints its port on a line and serves until it is ended. `role`
and `busy` are as in native_server.py.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
import threading
from functools import partial
from typing import NoReturn, cast

BACKLOG = 4096


def spin() -> NoReturn:
    """A thread that always wants the interpreter."""
    while True:
        pass


class Echo(asyncio.Protocol):
    """Sends back what it receives."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the connection."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """The reply."""
        self.transport.write(data)


class FanOut(asyncio.Protocol):
    """Sends to all what one of them sent."""

    members: set[asyncio.Transport] = set()  # noqa: RUF012, shared is what it is to be

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """One more."""
        self.transport = cast(asyncio.Transport, transport)
        self.members.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """One less."""
        self.members.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        """To all, but a single byte: its sender asks by it whether it is a member yet."""
        if len(data) == 1:
            self.transport.write(data)
            return
        for member in self.members:
            member.write(data)


class Datagrams(asyncio.DatagramProtocol):
    """Sends back each datagram."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the socket."""
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """The reply."""
        self.transport.sendto(data, addr)


def bound(kind: socket.SocketKind, number: int) -> socket.socket:
    """A socket on that port, made as every server here makes its own."""
    sock = socket.socket(type=kind)
    sock.setblocking(False)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", number))
    return sock


async def serve(name: str, role: str, number: int) -> None:
    """Serves for ever."""
    loop = asyncio.get_running_loop()
    sock = bound(socket.SOCK_DGRAM if role == "udp" else socket.SOCK_STREAM, number)
    number = sock.getsockname()[1]  # asked now, as a loop may take the descriptor away
    keep: object
    if role == "udp":
        keep = await loop.create_datagram_endpoint(Datagrams, sock=sock)
    else:
        sock.listen(BACKLOG)
        protocol = FanOut if role == "fanout" else Echo
        create_server = loop.create_server
        if name == "aiofastnet":
            create_server = partial(importlib.import_module(name).create_server, loop)
        keep = await create_server(protocol, sock=sock, backlog=BACKLOG)
    print(number, flush=True)
    await asyncio.Event().wait()
    del keep


def main() -> None:
    """Serves."""
    options = dict(argument.split("=") for argument in sys.argv[1:])
    name, role = options.pop("loop", "asyncio"), options.pop("role", "echo")
    number = int(options.pop("port", "0"))
    if options.pop("busy", "0") == "1":
        threading.Thread(target=spin, daemon=True).start()
    if options:
        raise SystemExit(f"not known: {', '.join(options)}")
    module = {"asyncio": "asyncio", "aiofastnet": "uvloop"}.get(name, name)
    with asyncio.Runner(loop_factory=importlib.import_module(module).new_event_loop) as runner:
        runner.run(serve(name, role, number))


if __name__ == "__main__":
    main()
