"""HTTPS on a completion port: the stdlib's TLS between the port and the program.

openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -subj /CN=localhost
python examples/tls.py --port 8443 --certificate cert.pem --key key.pem
curl -k https://127.0.0.1:8443/
curl -k https://127.0.0.1:8443/zeros/1000000 | wc -c

`ssl.SSLObject` does no I/O: it reads what came from the network out of one memory buffer and
writes what has to go there into another one (`ssl.MemoryBIO`). The port fills the one and empties
the other. The web server around it is as small as can be; see http_server.py for a real one.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator

import asyncio_native as an

REQUEST_SECONDS = 10.0
"""A client has to be done with the handshake and its request in this time."""

SEND_SECONDS = 30.0
"""A client has to take PIECE_BYTES in this time."""

REQUEST_LIMIT_BYTES = 16384
PIECE_BYTES = 65536


class Connection:
    """A client. One operation is in flight at any time: a receive, or the send of one piece."""

    def __init__(self, sock: an.AsyncSocket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._established = False
        self._deadline = time.monotonic() + REQUEST_SECONDS
        self._request = b""
        self._pieces: Iterator[bytes] | None = None  # the reply, while it is being sent

    def receive(self) -> None:
        """Starts a receive, with what is left of the time for the whole request."""
        self._sock.recv(timeout=max(0.0, self._deadline - time.monotonic()))

    def received(self, data: bytes) -> None:
        """Takes what came from the network."""
        self._incoming.write(data)
        try:
            if not self._established:
                self._tls.do_handshake()
                self._established = True
            complete = self._read_request()
        except ssl.SSLWantReadError:
            # All that came is used up, and more is needed. What TLS itself has to say (its part of
            # the handshake) goes out first.
            self._flush()
            self.receive()
            return
        except ssl.SSLError:
            complete = False  # not TLS at all, no version in common, ...: the peer gets an alert
        if complete:
            self._pieces = reply(self._request, self._tls.version())
            self.send_next()
        else:
            self._flush()
            self._sock.close(flush=True)

    def _read_request(self) -> bool:
        """Whether the request is complete, or else never will be. Raises as `SSLObject.read`."""
        while b"\r\n\r\n" not in self._request:
            data = self._tls.read(REQUEST_LIMIT_BYTES)
            self._request += data
            if not data or len(self._request) > REQUEST_LIMIT_BYTES:
                return False
        return True

    def send_next(self) -> None:
        """Sends the next piece of the reply; the completion of that calls this again.

        However long the reply, it is made and encrypted only as fast as the client takes it.
        """
        assert self._pieces is not None
        piece = next(self._pieces, None)
        if piece is not None:
            self._tls.write(piece)  # into memory, so that it takes all
            self._sock.send(self._outgoing.read(), timeout=SEND_SECONDS)
            return
        # Says "this was all" (close_notify): else nobody could tell it from a cut line. The error
        # is that it would wait for the peer to say the same; we need not.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._flush()
        self._sock.close(flush=True)

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._sock.send(self._outgoing.read(), quiet=True, timeout=SEND_SECONDS)


def reply(request: bytes, version: str | None) -> Iterator[bytes]:
    """The reply to an HTTP request, in pieces: its beginning and then the body."""
    path = request.split(b" ", 2)[1] if request.startswith(b"GET ") else b""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    digits = path.removeprefix(b"/zeros/")
    if path == b"/":
        text = f"hello over {version}\n".encode()
        yield head % len(text) + text
    elif digits != path and digits.isdigit() and len(digits) < 16:
        count = int(digits)
        yield head % count
        for start in range(0, count, PIECE_BYTES):
            yield bytes(min(PIECE_BYTES, count - start))
    else:
        yield b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def serve(port: an.CompletionPort, context: ssl.SSLContext) -> None:
    """Serves until something is posted."""
    while True:
        for c in port.dequeue_many():
            if c.kind is an.POST:
                return
            if c.kind is an.ACCEPT:
                if c.accepted:
                    connection = Connection(c.accepted, context)
                    port.associate(c.accepted, connection)
                    connection.receive()
                elif c.more:  # out of descriptors: accepting goes on by itself
                    print("accept:", c.error, file=sys.stderr)
                else:
                    c.result()  # raises the error that ended the accepting
            elif c.error or c.data == b"":
                c.socket.close()  # a failure, a time limit, the end of the stream
            elif c.socket.closed:
                pass  # a failure earlier in this batch
            elif c.kind is an.RECV:
                c.state.received(c.data)
            else:
                c.state.send_next()


def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="A small HTTPS server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    arguments = parser.parse_args()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(arguments.certificate, arguments.key)
    except OSError as error:  # a file that is not there; ssl.SSLError for what is in it
        sys.exit(f"{parser.prog}: {arguments.certificate} with {arguments.key}: {error}")
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
        serve(port, context)


if __name__ == "__main__":
    main()
