"""An HTTP/1.1 server for the files of a folder, fit to meet slow and rude clients.

pip install httptools
python examples/http_server.py --port 8080 --root /usr/share/doc
curl http://127.0.0.1:8080/

Keep-alive, pipelining, HEAD, files by `sendfile`, a deadline for each request. The parser is
httptools: that of Node.js, in C, strict in what it accepts. (h11 is as strict, but written in
Python; it would be most of the work here.)
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import mimetypes
import os
import signal
import socket
import stat
import sys
import time
import urllib.parse
from collections import deque
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path

import asyncio_native as an
import httptools

IDLE_SECONDS = 60.0
"""For so long a connection may stay open between two requests."""

SEND_SECONDS = 30.0
"""A client has to take a piece of a file, or the short answers before it, in this time."""

PIECE_BYTES = 1 << 20
"""A file is sent in pieces, because the time limit should be one for each, and not for them all."""

LINGER_SECONDS = 2.0
"""So long we wait for the client to close after we have said that we do; see `_answer`."""

RECEIVE_BYTES = 16384
"""So much is received at once. The requests in it (up to some hundreds, if they are pipelined) are
answered in one go, while all other clients wait: it should not be more than needed."""

REQUEST_LIMIT_BYTES = 65536
"""The most that is received for one request."""


@dataclasses.dataclass(slots=True)
class Request:
    """A request that has arrived as a whole."""

    method: bytes
    target: bytes
    keep_alive: bool
    error: HTTPStatus | None = None


class Connection:
    """A client. Exactly one operation is in flight on its socket at any time.

          ┌──────────────────────── all answered ────────────────────────┐
          ▼                                                              │
        receive ──► requests ──► answer one by one ──► sendfile, piece by piece
                                      └──► the last one ──► disconnect ──► receive to the end

    So the client's next bytes stay in the kernel until it has taken the answers to its last ones:
    who asks and never reads costs a bounded amount.
    """

    def __init__(self, sock: an.AsyncSocket, root: Path, request_seconds: float) -> None:
        self._sock = sock
        self._root = root
        self._request_seconds = request_seconds
        self._requests: deque[Request] = deque()  # pipelined, not answered yet
        self._file = -1  # the descriptor of the file that is being sent
        self._file_offset = 0
        self._file_end = 0
        self._keep_alive = True
        self._finishing = False
        # Of the request that is being received:
        self._parser = httptools.HttpRequestParser(self)
        self._in_request = False
        self._request_bytes = 0
        self._target = b""
        self._hosts = 0
        self._deadline = 0.0  # by time.monotonic()

    def start(self) -> None:
        """Receives the first request."""
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._set_deadline()
        self._receive()

    # -- completions ------------------------------------------------------------------------------

    def completed(self, c: an.Completion) -> None:
        """Goes on after the operation that was in flight."""
        if c.error or c.data == b"":
            self.close()  # a failure, a time limit, the end of the stream
        elif c.kind is an.RECV:
            if not self._finishing:
                self._parse(c.data)
                self._answer()
            else:
                self._receive()  # whatever it is: it came after the last request that we answer
        elif c.kind is an.SENDFILE:
            self._sent_piece(c.transferred)
        elif c.kind is an.SEND:  # all that was sent before has been taken
            self._set_deadline()
            self._answer()
        elif c.kind is an.DISCONNECT:
            self._deadline = time.monotonic() + LINGER_SECONDS
            self._receive()

    def close(self) -> None:
        """Closes the socket at once, and the file."""
        self._sock.close()
        self._close_file()

    # -- receiving --------------------------------------------------------------------------------

    def _receive(self) -> None:
        # Not a time limit for each receive: a client that sends a byte now and then would never
        # exceed it. Each receive gets what is left until one deadline.
        seconds = max(0.0, self._deadline - time.monotonic())
        self._sock.recv(RECEIVE_BYTES, timeout=seconds)

    def _set_deadline(self) -> None:
        """For the rest of a request that has begun, or for the next one to come."""
        seconds = self._request_seconds if self._in_request else IDLE_SECONDS
        self._deadline = time.monotonic() + seconds

    def _parse(self, data: bytes) -> None:
        """Feeds the parser, which calls the functions named `on_...`."""
        self._request_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # we know of nothing to upgrade to: it is answered as if it had not asked
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST)
        if self._request_bytes > REQUEST_LIMIT_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)

    def _refuse(self, error: HTTPStatus) -> None:
        """Queues a refusal as the last answer."""
        self._requests.append(Request(b"", b"", keep_alive=False, error=error))

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._target = b""
        self._hosts = 0
        self._in_request = True
        self._set_deadline()

    def on_url(self, piece: bytes) -> None:
        """The target, or a piece of it."""
        self._target += piece

    def on_header(self, name: bytes, _value: bytes) -> None:
        """A header."""
        self._hosts += name.lower() == b"host"

    def on_message_complete(self) -> None:
        """The last byte of a request, and of its body if it has one (which is ignored)."""
        parser = self._parser
        request = Request(
            parser.get_method(),
            self._target,
            keep_alive=parser.should_keep_alive() and not parser.should_upgrade(),
        )
        if self._hosts != 1 and parser.get_http_version() == "1.1":
            request.error = HTTPStatus.BAD_REQUEST  # RFC 9112, section 3.2
        self._requests.append(request)
        self._request_bytes = 0
        self._in_request = False
        self._set_deadline()

    # -- answering --------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Answers requests in their order, until one takes time or there are no more."""
        while self._requests and self._keep_alive:
            request = self._requests.popleft()
            self._keep_alive = request.keep_alive
            error = request.error or self._answer_with_file(request)
            if error:
                body = b"" if request.method == b"HEAD" else f"{error.phrase}\n".encode()
                head = self._head(error, len(error.phrase) + 1, "text/plain")
                # Quiet: it completes only if it fails.
                self._sock.send(head + body, quiet=True)
            elif self._file >= 0:
                self._send_piece()
                return
        if not self._keep_alive:
            # Closing at once would make the system answer what the client still sends with a reset,
            # and that may destroy our answer on its way. So only this direction is closed, and we
            # wait a little for the client to close the other one.
            self._finishing = True
            self._sock.disconnect(timeout=SEND_SECONDS)
        elif self._sock.unsent:
            # An empty send completes when all that was sent before it has been handed over.
            self._sock.send(b"", timeout=SEND_SECONDS)
        else:
            self._receive()

    def _answer_with_file(self, request: Request) -> HTTPStatus | None:
        """Sends the head, and opens the file if its content is to follow; or returns an error."""
        if request.method not in (b"GET", b"HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED
        try:
            name = file_name(self._root, request.target)
            descriptor, size = open_file(name)
        except (ValueError, httptools.HttpParserInvalidURLError):
            return HTTPStatus.BAD_REQUEST
        except PermissionError:
            return HTTPStatus.FORBIDDEN
        except OSError as error:
            out_of_descriptors = error.errno in (errno.EMFILE, errno.ENFILE)
            return HTTPStatus.SERVICE_UNAVAILABLE if out_of_descriptors else HTTPStatus.NOT_FOUND
        self._file, self._file_offset, self._file_end = descriptor, 0, size
        if request.method == b"HEAD" or not size:
            self._close_file()
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._sock.send(self._head(HTTPStatus.OK, size, content_type), quiet=True)
        return None

    def _head(self, status: HTTPStatus, size: int, content_type: str) -> bytes:
        allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
        return (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"Date: {http_date(int(time.time()))}\r\n"
            f"Content-Type: {content_type}\r\n"
            f"Content-Length: {size}\r\n"
            f"{allow}"
            f"Connection: {'keep-alive' if self._keep_alive else 'close'}\r\n\r\n"
        ).encode("ascii")

    def _send_piece(self) -> None:
        # From the file to the socket within the kernel, in order after the head. The port has its
        # own duplicate of the descriptor while it sends.
        count = min(PIECE_BYTES, self._file_end - self._file_offset)
        self._sock.sendfile(self._file, self._file_offset, count, timeout=SEND_SECONDS)

    def _sent_piece(self, count: int) -> None:
        self._file_offset += count
        if self._file_offset == self._file_end:
            self._close_file()
            self._set_deadline()
            self._answer()
        elif count:
            self._send_piece()
        else:
            self.close()  # the file has become shorter: the promised length cannot be kept

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def file_name(root: Path, target: bytes) -> str:
    """The file that a request names. Raises an error if it cannot be one of the folder."""
    url = httptools.parse_url(target)
    path = urllib.parse.unquote((url.path or b"/").decode("ascii"))
    if path.endswith("/"):
        path += "index.html"
    # Where it really is, after each ".." and each symbolic link: only there can it be judged.
    name = os.path.realpath(root / path.lstrip("/"))
    if not Path(name).is_relative_to(root):
        raise FileNotFoundError(name)
    return name


def open_file(name: str) -> tuple[int, int]:
    """The descriptor of a regular file, and its size in bytes."""
    # O_NONBLOCK: a named pipe in the folder would stop the whole server until somebody writes.
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileNotFoundError(name)
    return descriptor, status.st_size


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """The time as HTTP writes it; made once a second, not once a request."""
    return formatdate(second, usegmt=True)


def serve(port: an.CompletionPort, root: Path, request_seconds: float) -> None:
    """Serves until something is posted."""
    while True:
        for c in port.dequeue_many():
            if c.kind is an.POST:
                return
            if c.kind is an.ACCEPT:
                if c.accepted:
                    connection = Connection(c.accepted, root, request_seconds)
                    port.associate(c.accepted, connection)
                    connection.start()
                elif c.more:  # out of descriptors: accepting goes on by itself
                    print("accept:", c.error, file=sys.stderr)
                else:
                    c.result()  # raises the error that ended the accepting
                continue
            try:
                c.state.completed(c)
            except OSError:
                # The system refused to start something (no more descriptors, or the socket was
                # closed after a failure earlier in this batch): this connection ends, no other.
                c.state.close()


def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="An HTTP server for the files of a folder.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--root", type=Path, default=Path.cwd())
    parser.add_argument("--request-seconds", type=float, default=10.0)
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
        serve(port, arguments.root.resolve(), arguments.request_seconds)


if __name__ == "__main__":
    main()
