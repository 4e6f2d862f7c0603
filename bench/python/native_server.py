"""The server on asyncio_native that is measured, as its user would write it.

    native_server.py [backend=auto] [concurrency=1] [style=quiet] [role=echo] [deadline_s=0]
                     [busy=0] [port=0] [connections=0]

Prints its port on a line and serves until it is ended; an echo server with `connections=N` ends by
itself when so many connections have, for instruments that hold signals back. `style=quiet`: one
multishot receive for each connection, quiet sends. `style=plain`: an operation and a completion for
everything. `role`: `echo`; `udp`, the same over datagrams; `fanout`, where each message goes to
every connection. `deadline_s`: a connection that is silent for so long ends. `busy=1`: beside runs
a Python thread that never waits.
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import NoReturn

import asyncio_native as an

RECEIVE_BYTES = 256 * 1024  # as much as asyncio and uvloop receive at once
BACKLOG = 4096


def spin() -> NoReturn:
    """A thread that always wants the interpreter."""
    while True:
        pass


def listen(port: an.CompletionPort, number: int) -> an.AsyncSocket:
    """A listener whose connections inherit TCP_NODELAY; several servers may share its port."""
    listener = an.AsyncSocket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", number))
    listener.listen(BACKLOG)
    port.associate(listener)
    return listener


def echo(port: an.CompletionPort, number: int, deadline: float | None, limit: int) -> None:
    """Multishot receives, quiet sends."""
    listener = listen(port, number)
    listener.accept(multishot=True)
    announce(listener)
    ended = 0
    while True:
        for c in port.dequeue_many():
            if c.kind is an.RECV and c.data:
                c.socket.send(c.data, quiet=True)
            elif c.kind is an.RECV:
                c.socket.close(flush=True)
                ended += 1
                if ended == limit:
                    return
            elif c.kind is an.ACCEPT:
                accepted, _ = c.result()
                port.associate(accepted)
                accepted.recv(RECEIVE_BYTES, multishot=True, timeout=deadline)


def echo_plainly(port: an.CompletionPort, number: int, deadline: float | None, limit: int) -> None:
    """One operation after the other, and a completion for each."""
    listener = listen(port, number)
    listener.accept()
    announce(listener)
    ended = 0
    while True:
        for c in port.dequeue_many():
            if c.kind is an.RECV and c.data:
                c.socket.send(c.data)
            elif c.kind is an.SEND and not c.error:
                c.socket.recv(RECEIVE_BYTES, timeout=deadline)
            elif c.kind is an.ACCEPT:
                listener.accept()
                accepted, _ = c.result()
                port.associate(accepted)
                accepted.recv(RECEIVE_BYTES, timeout=deadline)
            else:
                c.socket.close(flush=True)
                ended += 1
                if ended == limit:
                    return


def echo_datagrams(port: an.CompletionPort, number: int) -> None:
    """Each datagram goes back to its sender."""
    sock = an.AsyncSocket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", number))
    port.associate(sock)
    sock.recvfrom(multishot=True)
    announce(sock)
    while True:
        for c in port.dequeue_many():
            if not c.error:
                sock.sendto(c.data, c.address, quiet=True)


def fan_out(port: an.CompletionPort, number: int) -> None:
    """Each message goes to every connection, its sender among them.

    But a single byte goes back alone: its sender asks by it whether it is a member yet.
    """
    listener = listen(port, number)
    listener.accept(multishot=True)
    announce(listener)
    members: set[an.AsyncSocket] = set()
    while True:
        for c in port.dequeue_many():
            if c.kind is an.RECV and len(c.data) == 1:
                c.socket.send(c.data, quiet=True)
            elif c.kind is an.RECV and c.data:
                data = c.data
                for member in members:
                    member.send(data, quiet=True)
            elif c.kind is an.RECV:
                members.discard(c.socket)
                c.socket.close()
            elif c.kind is an.ACCEPT:
                accepted, _ = c.result()
                port.associate(accepted)
                accepted.recv(multishot=True)
                members.add(accepted)


def announce(sock: an.AsyncSocket) -> None:
    """Tells whoever started this where to connect."""
    print(sock.getsockname()[1], flush=True)


def main() -> None:
    """Serves."""
    options = dict(argument.split("=") for argument in sys.argv[1:])
    port = an.CompletionPort(
        options.pop("backend", "auto"), concurrency=int(options.pop("concurrency", "1"))
    )
    number = int(options.pop("port", "0"))
    deadline = float(options.pop("deadline_s", "0")) or None
    role, style = options.pop("role", "echo"), options.pop("style", "quiet")
    limit = int(options.pop("connections", "0"))
    if options.pop("busy", "0") == "1":
        threading.Thread(target=spin, daemon=True).start()
    if options:
        raise SystemExit(f"not known: {', '.join(options)}")
    with port:
        if role == "udp":
            echo_datagrams(port, number)
        elif role == "fanout":
            fan_out(port, number)
        else:
            {"quiet": echo, "plain": echo_plainly}[style](port, number, deadline, limit)


if __name__ == "__main__":
    main()
