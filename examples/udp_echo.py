"""A UDP echo server: each datagram goes back to where it came from.

python examples/udp_echo.py --port 5555
echo hello | nc -u -w 1 127.0.0.1 5555
"""

from __future__ import annotations

import argparse
import signal
import socket

import asyncio_native as an

# Datagrams that the system cannot take at once wait in the socket's queue. Whoever sends datagrams
# expects that some get lost, so over this many bytes they do: a flood costs no more memory.
UNSENT_LIMIT_BYTES = 1 << 20


def serve(port: an.CompletionPort, sock: an.AsyncSocket) -> None:
    """Echoes until something is posted."""
    # One start for all datagrams to come. No datagram is longer than the default of 65,536 bytes,
    # so that none is truncated.
    sock.recvfrom(multishot=True)
    while True:
        for c in port.dequeue_many():
            if c.kind is an.POST:
                return
            if c.kind is an.SENDTO:
                continue  # an echo that could not be sent: it is lost, as datagrams may be
            if not c.error:
                if sock.unsent < UNSENT_LIMIT_BYTES:
                    # c.data may be b"": that is an empty datagram and not an end.
                    sock.sendto(c.data, c.address, quiet=True)
            elif not c.more:
                c.result()  # raises the error that ended the receiving


def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="A UDP echo server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5555)
    arguments = parser.parse_args()
    with an.CompletionPort() as port:
        # A signal handler may post: that wakes `dequeue_many`, and the loop ends in order.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: port.post())
        sock = an.AsyncSocket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((arguments.host, arguments.port))
        port.associate(sock)
        print("listening on {}:{}".format(*sock.getsockname()), flush=True)
        serve(port, sock)


if __name__ == "__main__":
    main()
