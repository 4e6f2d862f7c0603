"""The server process of ``c10k``: the echo server, plus a count of what it has accepted."""

from __future__ import annotations

import signal
import socket
import time
from multiprocessing.connection import Connection

from .c10k_board import Board, CpuTime, Failed, Listening, Order, Phase, listen_to_parent
from .common import error_text
from .echo import EchoServer


def serve(connection: Connection, board: Board, backend: str) -> None:
    """Listens on 127.0.0.1, says where, and serves until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        server = EchoServer(socket.AF_INET, ("127.0.0.1", 0), backend, board.count_accepted)
    except OSError as error:
        connection.send(Failed(f"the server cannot listen: {error_text(error)}"))
        return

    def obey(order: Phase | Order) -> None:
        if order is Order.TELL_CPU_TIME:
            connection.send(CpuTime(time.process_time()))
        elif order is Order.STOP:
            server.stop()

    try:
        host, port = server.address
        connection.send(Listening((host, port)))
        listen_to_parent(connection, obey)
        server.run()
    finally:
        server.close()
