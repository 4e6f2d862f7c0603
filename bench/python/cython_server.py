"""The server of examples/cython_echo: Python opens the port, the handler is Cython's.

    cython_server.py [backend=auto] [concurrency=1] [port=0]

Prints its port on a line, serves until SIGTERM, and prints what it counted as one line of JSON.
"""

from __future__ import annotations

import json
import signal
import socket
import sys

import asyncio_native as an
from cython_echo import EchoServer

BACKLOG = 4096


def main() -> None:
    """Serves."""
    options = dict(argument.split("=") for argument in sys.argv[1:])
    port = an.CompletionPort(
        options.pop("backend", "auto"), concurrency=int(options.pop("concurrency", "1"))
    )
    number = int(options.pop("port", "0"))
    if options:
        raise SystemExit(f"not known: {', '.join(options)}")
    with port:
        signal.signal(signal.SIGTERM, lambda *_: port.post())
        listener = an.AsyncSocket()
        # Accepted connections inherit the first; several servers may share the port by the second.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", number))
        listener.listen(BACKLOG)
        port.associate(listener)
        print(listener.getsockname()[1], flush=True)
        server = EchoServer(port, listener)
        server.serve()
        print(json.dumps({"waits": port.statistics().waits, "receives": server.messages}))


if __name__ == "__main__":
    main()
