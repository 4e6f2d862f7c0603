"""Starts the server: Python opens the port and the listener, and ends it at a signal.

python -m cython_echo --port 5555
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys

import asyncio_native as an

from . import EchoServer


def main() -> None:
    """Listens and serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="An echo server with its handler in Cython.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5555)
    arguments = parser.parse_args()
    with an.CompletionPort(concurrency=1) as port:
        # Any thread may post; a signal handler as well.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: port.post())
        listener = an.AsyncSocket()
        if sys.platform != "win32":  # there two servers could share the address
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((arguments.host, arguments.port))
        listener.listen()
        port.associate(listener)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        EchoServer(port, listener).serve()


if __name__ == "__main__":
    main()
