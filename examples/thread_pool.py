"""Several threads behind one port: what I/O completion ports were made for.

python examples/thread_pool.py --port 5555 --threads 4
echo secret | nc -N 127.0.0.1 5555

Each line is answered with a slow hash of it (PBKDF2, some 0.1 s of a processor). Work that blocks
would stop a server of one thread; here a thread that is busy leaves the port to the others. There
is no queue to hand work over, no thread that only accepts, and no lock: the port is the queue.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import socket
import sys
import threading

import asyncio_native as an

LINE_LIMIT_BYTES = 4096
ROUNDS = 200_000
"""Of PBKDF2; hashlib releases the interpreter lock meanwhile, as database drivers and files do."""


class Client:
    """What a connection keeps between two receives. No lock guards it: see `Worker`."""

    def __init__(self) -> None:
        self.unanswered = b""


class Worker(threading.Thread):
    """One of the threads. All run the same loop on the same port.

    The rule that makes locks needless: a connection has one operation in flight, and the next one
    is started as the last thing that is done with a completion. So no other thread can have a
    completion of this connection meanwhile, though the next one may go to any thread.
    (A multishot receive would give two threads two pieces of one stream at the same time.)
    """

    def __init__(self, port: an.CompletionPort) -> None:
        super().__init__()
        self._port = port

    def run(self) -> None:
        """Handles completions until one is a post."""
        while True:
            # One at a time: in a batch, the second would wait for the work on the first, while
            # another thread may have nothing to do.
            c = self._port.dequeue()
            if c is None or c.kind is an.POST:
                return
            if c.kind is an.ACCEPT:
                self._accepted(c)
            elif c.error:
                c.socket.close()
            elif c.kind is an.RECV:
                self._received(c)
            else:
                # The answer has been handed over: only now the next line is looked at. A client
                # that asks and never reads gets stuck here, and costs one answer.
                self._next(c.socket, c.state)

    def _accepted(self, c: an.Completion) -> None:
        if c.accepted:
            self._port.associate(c.accepted, Client())
            c.accepted.recv(LINE_LIMIT_BYTES)
        elif c.more:  # out of descriptors: accepting goes on by itself
            print("accept:", c.error, file=sys.stderr)
        else:
            c.result()  # raises the error that ended the accepting

    def _received(self, c: an.Completion) -> None:
        client: Client = c.state
        client.unanswered += c.data
        if c.data:
            self._next(c.socket, client)
        else:
            c.socket.close()

    def _next(self, sock: an.AsyncSocket, client: Client) -> None:
        """Answers one line, or receives more. Starting something is the last thing it does.

        One line a turn, for many lines may have come at once: the completion of the answer queues
        up behind those of the other clients.
        """
        line, end, rest = client.unanswered.partition(b"\n")
        if end:
            client.unanswered = rest
            sock.send(self._answer(line))
        elif len(line) <= LINE_LIMIT_BYTES:
            sock.recv(LINE_LIMIT_BYTES)
        else:
            sock.close()

    def _answer(self, line: bytes) -> bytes:
        key = hashlib.pbkdf2_hmac("sha256", line, b"salt", ROUNDS)
        return b"%s %s\n" % (key.hex().encode(), self.name.encode())


def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="Blocking work in several threads.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5555)
    parser.add_argument("--threads", type=int, default=2 * (os.cpu_count() or 1))
    arguments = parser.parse_args()
    with an.CompletionPort() as port:
        listener = an.AsyncSocket()
        if sys.platform != "win32":  # there two servers could share the address
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((arguments.host, arguments.port))
        listener.listen()
        port.associate(listener)
        listener.accept(multishot=True)
        workers = [Worker(port) for _ in range(arguments.threads)]

        def stop(*_: object) -> None:
            for _worker in workers:
                port.post()  # each worker takes one and ends, after what it has in hand

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        for worker in workers:
            worker.start()
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        for worker in workers:
            while worker.is_alive():
                # Python runs signal handlers in the main thread; on Windows not while it waits.
                worker.join(0.25)


if __name__ == "__main__":
    main()
