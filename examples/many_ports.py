"""A process for each processor, each with a port and a listener of its own.

python examples/many_ports.py --port 5555
nc 127.0.0.1 5555

The interpreter lock lets one thread of a process run Python at a time, so a server that is busy
with Python itself needs processes. They share nothing: with SO_REUSEPORT each listens on the same
address, and Linux spreads new connections over the listeners. (macOS and the BSDs know the option,
but all connections may go to one listener there; FreeBSD spreads them with SO_REUSEPORT_LB.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
from typing import Any

import asyncio_native as an

UNSENT_LIMIT_BYTES = 1 << 20


def serve(address: tuple[str, int], lifeline: socket.socket) -> None:
    """A child process: greets with its process number, then echoes, until the lifeline ends."""
    # Ctrl-C on a terminal goes to all processes: the parent decides when the children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    greeting = b"process %d\n" % os.getpid()
    # concurrency=1: no other thread of this process will ever dequeue.
    with an.CompletionPort(concurrency=1) as port:
        listener = reusing_socket(address)
        listener.listen()
        port.associate(listener)
        listener.accept(multishot=True)
        # The parent holds the other end. It ends when the parent closes it, and also when the
        # parent dies of something that it cannot handle: no child stays behind.
        parent = an.AsyncSocket.adopt(lifeline)
        port.associate(parent)
        parent.send(b"ready", quiet=True)
        ending = parent.recv()
        while True:
            for c in port.dequeue_many():
                if c.operation is ending:
                    return
                if c.kind is an.ACCEPT:
                    accepted(port, c, greeting)
                elif c.kind is an.RECV and c.data:
                    if not c.socket.closed:  # by the failure of a send in the same batch
                        c.socket.send(c.data, quiet=True)
                elif not c.socket.closed:
                    # The end of the stream: what was sent before goes out. Or a failure.
                    c.socket.close(flush=not c.error)


def accepted(port: an.CompletionPort, c: an.Completion, greeting: bytes) -> None:
    """Starts a connection."""
    if c.accepted:
        port.associate(c.accepted)
        c.accepted.send(greeting, quiet=True)
        # Nothing more is received from a client that does not read.
        c.accepted.recv(multishot=True, pause_above=UNSENT_LIMIT_BYTES)
    elif c.more:  # out of descriptors: accepting goes on by itself
        print("accept:", c.error, file=sys.stderr)
    else:
        c.result()  # raises the error that ended the accepting


def reusing_socket(address: tuple[str, int]) -> an.AsyncSocket:
    """A socket bound to an address that others may be bound to as well."""
    sock = an.AsyncSocket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    return sock


def main() -> int:
    """Starts the processes and waits until SIGINT, SIGTERM or the end of one of them."""
    parser = argparse.ArgumentParser(description="An echo server of several processes.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5555)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    # Bound, but not listening: it gets no connections. It keeps the port number that the system
    # chose until all children have bound to it.
    holder = reusing_socket((arguments.host, arguments.port))
    address = holder.getsockname()
    # "spawn": a fresh interpreter. A fork would copy whatever else the parent has open.
    context = multiprocessing.get_context("spawn")
    lifelines: list[socket.socket] = []
    processes: list[Any] = []

    def stop(*_: object) -> None:
        for lifeline in lifelines:
            lifeline.close()

    for _ in range(arguments.processes):
        ours, childs = socket.socketpair()
        process = context.Process(target=serve, args=(address, childs))
        process.start()
        childs.close()
        lifelines.append(ours)
        processes.append(process)
    ready = all(lifeline.recv(5) == b"ready" for lifeline in lifelines)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    holder.close()
    if ready:
        print("listening on {}:{}".format(*address), flush=True)
        # One that ends while nobody asked for it would leave fewer than were wanted: all end then,
        # and whatever started this program sees its status and may start it again.
        multiprocessing.connection.wait([process.sentinel for process in processes])
    stop()
    for process in processes:
        process.join()
    return 0 if all(process.exitcode == 0 for process in processes) else 1


if __name__ == "__main__":
    sys.exit(main())
