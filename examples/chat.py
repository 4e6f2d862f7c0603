"""A chat room: each line that somebody sends goes to all others.

python examples/chat.py --port 5555
nc 127.0.0.1 5555          (in two terminals)

In a broadcast the slowest reader decides what happens to all: waiting for it stops the room, and
keeping all that it has not read yet fills the memory. Here is a rule instead: who is more than
UNSENT_LIMIT_BYTES behind is dropped.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys

import asyncio_native as an

UNSENT_LIMIT_BYTES = 1 << 20
"""What the room keeps for one reader, above the megabytes that the system's own buffers take."""

LINE_LIMIT_BYTES = 4096
"""A client that sends more without a line's end is no chatter: it is dropped."""


class Member:
    """A client in the room."""

    def __init__(self, sock: an.AsyncSocket, name: str) -> None:
        self.sock = sock
        self.name = name.encode()
        self.line = b""  # what came after the last line's end


class Room:
    """All members. It runs in one thread, so it needs no lock."""

    def __init__(self, port: an.CompletionPort) -> None:
        self._port = port
        self._members: set[Member] = set()

    def enter(self, sock: an.AsyncSocket, address: tuple[str, int]) -> None:
        """Takes in a new connection."""
        member = Member(sock, "{}:{}".format(*address))
        # Else a line waits until the peer has acknowledged the one before (Nagle's algorithm).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The member comes back as `c.state` with each completion of its socket.
        self._port.associate(sock, member)
        sock.recv(LINE_LIMIT_BYTES, multishot=True)
        self._members.add(member)
        self.broadcast(b"* %b has come, we are %d\n" % (member.name, len(self._members)))

    def leave(self, member: Member) -> None:
        """Takes out a member; a second time does nothing."""
        if member in self._members:
            self._remove(member)
            self.broadcast(b"* %b has left\n" % member.name)

    def heard(self, member: Member, data: bytes) -> None:
        """Passes on the whole lines in what a member sent and keeps the rest."""
        if member not in self._members:
            return  # dropped a moment ago, and this was in the same batch of completions
        *lines, member.line = (member.line + data).split(b"\n")
        if len(member.line) > LINE_LIMIT_BYTES:
            self.leave(member)
        elif lines:
            # The lines of one receive go out as one send.
            text = b"".join(b"%b: %b\n" % (member.name, line) for line in lines)
            self.broadcast(text, but=member)

    def broadcast(self, text: bytes, but: Member | None = None) -> None:
        """Sends to all members but one, and drops those who are too far behind."""
        while text:
            slow = []
            for member in self._members:
                if member is but:
                    continue
                # Quiet: no completion, and no memory but for what the system does not take at
                # once, which is copied and counts as `unsent`.
                member.sock.send(text, quiet=True)
                if member.sock.unsent > UNSENT_LIMIT_BYTES:
                    slow.append(member)
            for member in slow:
                self._remove(member)
            # The others are told, which may show that another one is too slow, and so on.
            text = b"".join(b"* %b was too slow\n" % member.name for member in slow)
            but = None

    def _remove(self, member: Member) -> None:
        self._members.remove(member)
        # At once: what it has not read is dropped, and the memory is free.
        member.sock.close()


def serve(port: an.CompletionPort) -> None:
    """Runs the room until something is posted."""
    room = Room(port)
    while True:
        for c in port.dequeue_many():
            if c.kind is an.POST:
                return
            if c.kind is an.ACCEPT:
                if c.accepted:
                    room.enter(c.accepted, c.address)
                elif c.more:  # out of descriptors: accepting goes on by itself
                    print("accept:", c.error, file=sys.stderr)
                else:
                    c.result()  # raises the error that ended the accepting
            elif c.kind is an.RECV and c.data:
                room.heard(c.state, c.data)
            else:  # the end of the stream, a failed receive, or a quiet send that failed
                room.leave(c.state)


def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="A chat room.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5555)
    arguments = parser.parse_args()
    with an.CompletionPort() as port:
        # A signal handler may post: that wakes `dequeue_many`, and the loop ends in order.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: port.post())
        listener = an.AsyncSocket()
        if sys.platform != "win32":  # there two servers could share the address
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((arguments.host, arguments.port))
        listener.listen()
        port.associate(listener)
        listener.accept(multishot=True)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        serve(port)


if __name__ == "__main__":
    main()
